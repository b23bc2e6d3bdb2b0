"""The locked packages: made of pip's report, fit for what the project asks for, of no index's own."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.lock import FOLDER, ROOT, LockError, constraints, hashes, locked

LINE = re.compile(r"([a-z0-9-]+)==(\S+?)( --hash=sha256:[0-9a-f]{64})?")


def entry(name: str, version: str, url: str = "", sha256: str | None = "0" * 64) -> dict[str, Any]:
    info = {} if sha256 is None else {"archive_info": {"hashes": {"sha256": sha256}}}
    wheel = url or f"https://index.example/{name}-{version}-py3-none-any.whl"
    return {"metadata": {"name": name, "version": version}, "download_info": {"url": wheel, **info}}


def lines(text: str) -> dict[str, tuple[str, bool]]:
    """(version, has a digest) by package."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match is not None, line
            found[match[1]] = (match[2], match[3] is not None)
    return found


def test_a_report_becomes_versions_and_digests_without_the_project_or_an_address() -> None:
    own = entry("moe-guard", "0.1.0", "file:///checkout", None)
    packages = locked(
        {"install": [own, entry("torch", "2.13.0+cpu"), entry("Some.Name", "1!2.0.post1")]}
    )

    assert lines(constraints(packages)) == {
        "some-name": ("1!2.0.post1", False),
        "torch": ("2.13.0", False),
    }
    assert lines(hashes(packages)) == {"some-name": ("1!2.0.post1", True)}
    assert "torch 2.13.0+cpu" in hashes(packages)
    assert "index.example" not in constraints(packages) + hashes(packages)


@pytest.mark.parametrize(
    "one", [entry("a", "1", sha256=None), entry("a", "1", "https://index.example/a-1.tar.gz")]
)
def test_what_would_be_built_from_source_or_has_no_digest_is_refused(one: dict[str, Any]) -> None:
    with pytest.raises(LockError, match="a: pip found no wheel with a SHA-256"):
        locked({"install": [one]})


def test_what_the_project_asks_for_is_locked_at_a_version_that_it_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    have = lines((FOLDER / "constraints.txt").read_text("utf-8"))
    missing = []
    for text in [*project["dependencies"], *extras["cpu"], *extras["dev"]]:
        asked = Requirement(text)
        version, _ = have.get(canonicalize_name(asked.name), ("0", False))
        if not asked.specifier.contains(version, prereleases=True):
            missing.append(f"{text}, not {version}: run make lock")
    assert missing == []


def test_digests_are_of_the_same_versions_and_only_local_builds_have_none() -> None:
    versions = lines((FOLDER / "constraints.txt").read_text("utf-8"))
    files = sorted(FOLDER.glob("hashes-*.txt"))
    assert files
    for file in files:
        digests = lines(file.read_text("utf-8"))
        assert all(has_digest for _, has_digest in digests.values())
        assert {name: version for name, (version, _) in digests.items()} == {
            name: version for name, (version, _) in versions.items() if name != "torch"
        }


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.name)
def test_no_address_of_an_index_is_written_down(file: Any) -> None:
    text = file.read_text("utf-8")
    assert not re.search(r"://|--(?:extra-)?index-url|--find-links|@ ", text)
