"""What tests showed of the support table: facts, and how they become cells.

A fact is one test's word on one cell, with that test's outcome. A cell works where every test that
spoke of it passed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

Method = Literal["observe", "reroute", "drop", "drop_renorm", "force"]
Runner = Literal["v1", "v2", "router"]
Mode = Literal["eager", "compiled"]
Status = Literal["works", "refused", "not tested", "fails"]

METHODS: tuple[Method, ...] = get_args(Method)
RUNNERS: tuple[Runner, ...] = get_args(Runner)
MODES: tuple[Mode, ...] = get_args(Mode)
ONE_WORKER = "none"
"""The parallelism of an engine that has one worker."""


class Cell(NamedTuple):
    """runner: Model Runner V1 or V2 in a real engine, or `router` for the family's own routing code
    called without an engine; parallelism: `none`, or a layout such as `TP=2`."""

    family: str
    parallelism: str
    runner: Runner
    mode: Mode
    method: Method


@dataclass(frozen=True, slots=True)
class Fact:
    """reason: why the guard refuses this, or why vLLM itself cannot run it here."""

    cell: Cell
    test: str
    passed: bool
    status: Literal["works", "refused", "not tested"] = "works"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all facts on a cell come to. tests: the files that showed it."""

    status: Status
    reason: str
    tests: tuple[str, ...]


def facts_of(
    test: str,
    passed: bool,
    family: str,
    methods: Iterable[Method],
    *,
    runner: Runner = "v1",
    mode: Mode = "eager",
    parallelism: str = ONE_WORKER,
    refused: str = "",
    untestable: str = "",
) -> list[Fact]:
    """Raises ValueError for a word that the table does not know."""
    wanted = tuple(methods)
    for words, known in ((wanted, METHODS), ((runner,), RUNNERS), ((mode,), MODES)):
        if not words or set(words) - set(known):
            raise ValueError(f"the support table has {', '.join(known)}, not {words}")
    if refused and untestable:
        raise ValueError("a cell is refused by the guard or cannot be tested here, not both")
    status: Literal["works", "refused", "not tested"] = (
        "refused" if refused else "not tested" if untestable else "works"
    )
    return [
        Fact(
            Cell(family, parallelism, runner, mode, method), test, passed, status, refused or untestable
        )
        for method in wanted
    ]


def verdicts(facts: Iterable[Fact]) -> dict[Cell, Verdict]:
    """By cell, sorted. Tests that contradict each other make a cell fail, as a failed test does."""
    by_cell: dict[Cell, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_cell[fact.cell].append(fact)
    return {cell: _verdict(by_cell[cell]) for cell in sorted(by_cell, key=_order)}


def _order(cell: Cell) -> tuple[Any, ...]:
    return (
        cell.family.casefold(),
        cell.parallelism != ONE_WORKER,
        cell.parallelism,
        RUNNERS.index(cell.runner),
        MODES.index(cell.mode),
        METHODS.index(cell.method),
    )


def _verdict(facts: list[Fact]) -> Verdict:
    tests = tuple(sorted({fact.test.partition("::")[0] for fact in facts}))
    failed = sorted(fact.test for fact in facts if not fact.passed)
    if failed:
        return Verdict("fails", f"{failed[0]} failed", tests)
    said = sorted({(fact.status, fact.reason) for fact in facts})
    if len({status for status, _ in said}) > 1:
        return Verdict("fails", f"tests disagree: {', '.join(status for status, _ in said)}", tests)
    return Verdict(said[0][0], "; ".join(reason for _, reason in said if reason), tests)


def as_json(facts: Iterable[Fact]) -> list[dict[str, Any]]:
    return [asdict(fact) | {"cell": fact.cell._asdict()} for fact in facts]


def from_json(stored: Iterable[dict[str, Any]]) -> list[Fact]:
    return [Fact(**{**fact, "cell": Cell(**fact["cell"])}) for fact in stored]
