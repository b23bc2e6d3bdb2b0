"""docs/SECURITY.md names tests that exist, and every attack has its place in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ATTACKS = ROOT / "tests" / "integration" / "attacks"
DOCUMENT = ROOT / "docs" / "SECURITY.md"

_NAMED = re.compile(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`")
_NO_ATTACKS = {"test_route_walk.py"}


def named_tests() -> list[tuple[str, str]]:
    return sorted(set(_NAMED.findall(DOCUMENT.read_text("utf-8"))))


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "function"), named_tests(), ids=lambda name: name or "file")
def test_a_test_that_the_document_names_exists(file: str, function: str) -> None:
    path = ROOT / file if "/" in file else ATTACKS / file
    assert path.is_file(), file
    assert not function or function in functions_of(path), f"{file} has no {function}"


def test_every_attack_is_in_the_document() -> None:
    named = {(Path(file).name, function) for file, function in named_tests()}
    for file in sorted(ATTACKS.glob("test_*.py")):
        if file.name not in _NO_ATTACKS:
            tests = {name for name in functions_of(file) if name.startswith("test_")}
            missing = {name for name in tests if (file.name, name) not in named}
            assert not missing, f"not in docs/SECURITY.md: {file.name} {sorted(missing)}"


def test_the_checklist_has_thirty_attempts_and_says_what_happened_to_each() -> None:
    rows = [line for line in DOCUMENT.read_text("utf-8").splitlines() if "::test_" in line]
    assert len(rows) >= 30
    for row in rows:
        _, attempt, happened, tests, _ = row.split("|")
        assert attempt.strip()
        assert happened.strip()
        assert _NAMED.search(tests)
