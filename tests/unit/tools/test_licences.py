"""Licences: what is installed is allowed, and what would not be is found."""

from __future__ import annotations

from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from tools.licences import ALLOWED, EXEMPT, Exempt, installed, licence_of, refused


def distribution(folder: Path, *lines: str, name: str = "some.Package") -> Distribution:
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1"]
    (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    return PathDistribution(info)


def test_nothing_is_installed_under_a_licence_that_nobody_allowed() -> None:
    found = installed()
    assert len(found) > 100
    assert refused(found) == []


def test_every_exception_is_argued() -> None:
    assert all(len(one.why) > 15 for one in EXEMPT.values())
    assert not [name for name in ALLOWED if "GPL" in name]


@pytest.mark.parametrize(
    "lines",
    [
        ["License-Expression: MIT"],
        ["License-Expression: GPL-3.0-only OR MIT"],
        ["License-Expression: Apache-2.0 AND MIT"],
        ["License: MIT"],
        ["License: Apache 2.0 License"],
        ["Classifier: License :: OSI Approved :: MIT License"],
        ["License: see below", "Classifier: License :: OSI Approved :: BSD License"],
        [
            "Classifier: License :: OSI Approved :: MIT License",
            "Classifier: License :: OSI Approved :: BSD License",
        ],
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, lines: list[str]) -> None:
    assert refused([licence_of(distribution(tmp_path, *lines))]) == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["License-Expression: GPL-3.0-only"], "GPL-3.0-only: not allowed"),
        (["License-Expression: AGPL-3.0-or-later AND MIT"], "not allowed"),
        (["License-Expression: LicenseRef-Proprietary"], "not known here"),
        (["License: Custom", "Classifier: License :: Other/Proprietary License"], "not known here"),
        (["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], "not known"),
        (
            [
                "Classifier: License :: OSI Approved :: MIT License",
                "Classifier: License :: OSI Approved :: GNU Affero General Public License v3",
            ],
            "not known here",
        ),
        # The expression says what holds, whatever a classifier adds.
        (
            ["License-Expression: SSPL-1.0", "Classifier: License :: OSI Approved :: MIT License"],
            "SSPL-1.0: not allowed",
        ),
        ([], "its metadata names no licence: not known here"),
    ],
    ids=["gpl", "and", "reference", "proprietary", "classifier", "two", "contradiction", "none"],
)
def test_what_is_not_is_named(tmp_path: Path, lines: list[str], said: str) -> None:
    (line,) = refused([licence_of(distribution(tmp_path, *lines))])
    assert line.startswith("some-package: ")
    assert said in line


def test_an_exception_is_for_what_was_looked_at_and_not_for_another_licence(tmp_path: Path) -> None:
    found = [licence_of(distribution(tmp_path, "License-Expression: GPL-2.0-only"))]
    assert refused(found, {"some-package": Exempt("GPL-2.0-only", "")}) == []
    assert refused(found, {"some-package": Exempt("LGPL-2.1-only", "")})
