"""Files as people write them wrongly: each is refused with every fault at its place, and the fix named.

A file of `malformed/` begins with what it must be refused with: `# LINE:COLUMN: a part of the message`,
for a fault elsewhere `# FILE:LINE:COLUMN: …`, one for each fault and no others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from guard.policy import PolicyError, load_policies

FOLDER = Path(__file__).parent / "malformed"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPECTED = re.compile(r"# (?:(?P<file>\S+\.json):)?(?P<line>\d+):(?P<column>\d+): (?P<part>.+)")


class Expected(NamedTuple):
    file: str
    line: int
    column: int
    part: str


def expected(path: Path) -> list[Expected]:
    lines = path.read_text().splitlines()
    assert lines[0] == "# Refused with:"
    found = []
    for line in lines[1:]:
        if (match := EXPECTED.fullmatch(line)) is None:
            break
        place = int(match["line"]), int(match["column"])
        found.append(Expected(match["file"] or path.name, *place, match["part"]))
    return found


def test_the_corpus_is_as_large_as_it_is_said_to_be() -> None:
    assert len(FILES) >= 150


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_malformed_file_is_refused_with_each_of_its_faults(path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policies(path)

    wanted = expected(path)
    found = [(Path(f.location.file).name, *f.location[1:], f.message) for f in caught.value.faults]
    assert [fault[:3] for fault in found] == [fault[:3] for fault in wanted]
    for fault, one in zip(found, wanted, strict=True):
        assert one.part in fault[3]


def test_a_folder_with_one_malformed_file_loads_nothing_of_it(tmp_path: Path) -> None:
    good = (
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: good}\n"
        "spec: {rules: [{name: r, when: always}]}\n"
    )
    (tmp_path / "good.yaml").write_text(good)
    assert len(load_policies(tmp_path).policies) == 1
    (tmp_path / "bad.yaml").write_text((FOLDER / "mode-upper-case.yaml").read_text())

    with pytest.raises(PolicyError) as caught:
        load_policies(tmp_path)

    assert [Path(fault.location.file).name for fault in caught.value.faults] == ["bad.yaml"]
