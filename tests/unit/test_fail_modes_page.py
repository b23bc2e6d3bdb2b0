"""docs/fail-modes.md against the code: its tests exist, stages have rows, its bounds are the code's."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from guard.failures import Stage
from guard.fault_injection import MESSAGE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "fail-modes.md").read_text("utf-8")
LEAST_FAULTS = 20


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of its tables, without their heads."""
    found = []
    for line in section(title).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and not line.startswith(("| fault", "| what", "| place", "| **")):
            found.append(cells)
    return found


FAULTS, BOUNDS = rows("Faults"), rows("Bounded memory")
TESTS = dict(re.findall(r"^(\d+)\. (.+)$", section("Tests"), re.MULTILINE))


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", TESTS)
def test_every_test_that_is_named_exists(number: str) -> None:
    for part in TESTS[number].split("; "):
        file, *names = re.findall(r"`([^`]+)`", part)
        assert names
        assert set(names) <= names_in(file), f"{number}: {file}"


def test_every_row_has_tests_and_every_number_is_used() -> None:
    assert len(FAULTS) >= LEAST_FAULTS
    for cells in FAULTS:
        assert re.search(r"\[\d+\]", cells[-1]), cells[0]
        assert len(cells) == 5, cells[0]
    assert set(re.findall(r"\[(\d+)\]", PAGE)) == TESTS.keys()


def test_every_stage_has_a_row() -> None:
    named = {match for cells in FAULTS for match in re.findall(r"^`(\w+)`:", cells[0])}
    assert named == {*map(str, Stage), MESSAGE}


@pytest.mark.parametrize("cells", BOUNDS, ids=lambda cells: cells[-1].strip("` |"))
def test_a_bound_is_what_the_code_has(cells: list[str]) -> None:
    number, _, unit = cells[1].partition(" ")
    said = int(number.replace(",", "")) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[unit]
    module, _, name = cells[-1].strip("` |").rpartition(".")
    assert getattr(importlib.import_module(module), name) == said


_NOT_IN_A_SERVER = ("testing", "offline", "discover", "cli")


def modules_with_queues() -> set[str]:
    """Those that make one that somebody may fill faster than somebody else empties it."""
    found = set()
    for root in (ROOT, ROOT / "integrations" / "vllm"):
        for path in root.glob("guard*/**/*.py"):
            if path.parent.name in _NOT_IN_A_SERVER:
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and re.fullmatch(
                    r"(\w+\.)*(deque|Queue|SimpleQueue)(\[.*\])?", ast.unparse(node.func)
                ):
                    found.add(".".join(path.relative_to(root).with_suffix("").parts))
    return found


def test_every_queue_has_a_bound_that_is_told() -> None:
    told = {cells[-1].strip("` |").rpartition(".")[0] for cells in BOUNDS}
    assert modules_with_queues() - told == _OTHERWISE_BOUNDED


_OTHERWISE_BOUNDED = {
    "guard.source.watcher",  # of wishes to look now: by an operator's signals
    "guard.device.pipeline",  # by the steps that the engine has under way
}
