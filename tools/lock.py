"""Write down which packages `make install` takes: `python -m tools.lock`.

pip itself is asked, with whatever indexes it is told of, what it would install; nothing is installed.

* requirements/constraints.txt: versions, without hashes, so it holds on any platform and index.
* requirements/hashes-cp311-linux-x86_64.txt, or what this interpreter is called: the same with the
  digests of the wheels that pip chose here. A build with a local version (torch's `+cpu`) is left out:
  each index has builds of its own, so its digest says nothing elsewhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / "requirements"
TORCH: Final = "torch==2.13.0+cpu"
OWN: Final = "moe-guard"
_HEAD: Final = "# Written by `make lock`: what `make install` takes.\n"


class Locked(NamedTuple):
    """sha256: of the wheel that pip chose on this platform"""

    name: str
    version: str
    sha256: str

    @property
    def is_local(self) -> bool:
        return Version(self.version).local is not None


class LockError(ValueError):
    """What pip says cannot be locked."""


def report_of_pip() -> dict[str, Any]:
    """What pip would install. It downloads the metadata of some 200 packages: minutes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(file), TORCH, "--editable", f"{ROOT}[cpu,dev]"]
        subprocess.run(command, check=True)
        report: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return report


def locked(report: dict[str, Any]) -> list[Locked]:
    """Raises LockError for a package that is built here, or has no digest."""
    found = []
    for one in report["install"]:
        name = canonicalize_name(one["metadata"]["name"])
        if name == OWN:
            continue
        archive = one["download_info"].get("archive_info", {})
        sha256 = archive.get("hashes", {}).get("sha256")
        if sha256 is None or not one["download_info"]["url"].endswith(".whl"):
            raise LockError(f"{name}: pip found no wheel with a SHA-256; it would be built from source")
        found.append(Locked(name, one["metadata"]["version"], sha256))
    return sorted(found)


def constraints(packages: Iterable[Locked]) -> str:
    lines = [f"{one.name}=={Version(one.version).public}\n" for one in packages]
    return (
        _HEAD
        + "# Versions alone; hashes-*.txt beside it has the digests for a platform.\n"
        + "".join(lines)
    )


def hashes(packages: Iterable[Locked]) -> str:
    lines = [
        f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n"
        for one in packages
        if not one.is_local
    ]
    left_out = [f"{one.name} {one.version}" for one in packages if one.is_local]
    note = f"# Not here, since each index has a build of its own: {', '.join(left_out) or 'nothing'}.\n"
    return _HEAD + note + "".join(lines)


def hashes_file() -> Path:
    """For this interpreter and machine."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return FOLDER / f"hashes-{python}-{platform.system().lower()}-{platform.machine()}.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--report", type=Path, help="a report that `pip install --report` wrote before")
    given = parser.parse_args().report
    try:
        packages = locked(report_of_pip() if given is None else json.loads(given.read_text("utf-8")))
    except LockError as error:
        print(error, file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    for file, text in (
        (FOLDER / "constraints.txt", constraints(packages)),
        (hashes_file(), hashes(packages)),
    ):
        file.write_text(text, "utf-8")
        print(f"{file.relative_to(ROOT)}: {text.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
