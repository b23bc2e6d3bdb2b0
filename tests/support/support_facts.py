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


IN_A_KERNEL = "Qwen3-MoE in a kernel that routes"
"""A stand-in for such a kernel: those that vLLM has run on GPUs."""

SERVING = (
    "chunked prefill",
    "prefix caching",
    "preemption and recompute",
    "n > 1",
    "log probabilities",
    "streamed output",
    "structured output",
    "priority scheduling",
    "async scheduling",
    "speculative decoding: n-gram",
    "speculative decoding: draft model",
    "speculative decoding: EAGLE, MTP, Medusa, suffix",
    "cancelled requests",
    "ten requests for each slot",
    "weights reloaded while serving",
    "several API servers",
    "mixed load of 200 requests",
    "beam search",
    "streamed input",
)
"""What requests may ask for, and how an engine may serve them."""

HOSTS = (
    "tensor parallelism",
    "pipeline parallelism",
    "speculative decoding in a pipeline",
    "data parallelism",
    "data parallelism: external or hybrid load balancer",
    "data parallelism: elastic (--enable-elastic-ep)",
    "data parallelism with pipeline parallelism",
    "expert parallelism",
    "expert parallelism with tensor and data parallelism",
    "expert load balancing (EPLB)",
    "dual-batch overlap (DBO)",
    "context parallelism",
    "LoRA adapters",
    "KV connectors and offloading",
    "KV sharing in fast prefill",
    "sleep mode",
    "weight transfer",
    "speculative decoding: other drafters",
    "adaptive verification of drafts",
    "synthetic acceptance of drafts",
    "prompt embeddings",
    "pooling models",
    "encoder-decoder models",
    "diffusion models",
    "multimodal inputs",
    "kernels that route inside: vLLM has another",
    "kernels that route inside: logits are enough",
    "kernels that route inside: logits are not enough",
    "dense models",
    "gRPC server",
    "Rust front end",
    "Ray executor",
    "external launcher",
    "NVIDIA or AMD GPUs",
)
"""What a server may be started with."""

FEATURES = (*SERVING, *HOSTS)


class Feature(NamedTuple):
    """name: one of `FEATURES`; runner: `any` where the tests that speak of it run none"""

    name: str
    runner: Runner | Literal["any"]
    mode: Mode


@dataclass(frozen=True, slots=True)
class Fact:
    """reason: why the guard refuses this, or why vLLM itself cannot run it here."""

    cell: Cell | Feature
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
    said = _said(refused, untestable)
    return [
        Fact(Cell(family, parallelism, runner, mode, method), test, passed, *said) for method in wanted
    ]


def feature_fact(
    test: str,
    passed: bool,
    name: str,
    *,
    runner: Runner | Literal["any"] = "any",
    mode: Mode = "eager",
    refused: str = "",
    untestable: str = "",
) -> Fact:
    """Raises ValueError for a word that the table does not know."""
    for word, known in ((name, FEATURES), (runner, (*RUNNERS, "any")), (mode, MODES)):
        if word not in known:
            raise ValueError(f"the support table has {', '.join(known)}, not {word}")
    return Fact(Feature(name, runner, mode), test, passed, *_said(refused, untestable))


def _said(refused: str, untestable: str) -> tuple[Literal["works", "refused", "not tested"], str]:
    if refused and untestable:
        raise ValueError("a cell is refused by the guard or cannot be tested here, not both")
    status: Literal["works", "refused", "not tested"] = (
        "refused" if refused else "not tested" if untestable else "works"
    )
    return status, refused or untestable


def verdicts(facts: Iterable[Fact]) -> dict[Cell, Verdict]:
    """By cell, sorted. Tests that contradict each other make a cell fail, as a failed test does."""
    by_cell: dict[Cell, list[Fact]] = defaultdict(list)
    for fact in facts:
        if isinstance(fact.cell, Cell):
            by_cell[fact.cell].append(fact)
    return {cell: _verdict(by_cell[cell]) for cell in sorted(by_cell, key=_order)}


def feature_verdicts(facts: Iterable[Fact]) -> dict[Feature, Verdict]:
    """As `verdicts`, in the order of `FEATURES`."""
    by_feature: dict[Feature, list[Fact]] = defaultdict(list)
    for fact in facts:
        if isinstance(fact.cell, Feature):
            by_feature[fact.cell].append(fact)
    return {cell: _verdict(by_feature[cell]) for cell in sorted(by_feature, key=_feature_order)}


def _feature_order(cell: Feature) -> tuple[Any, ...]:
    return FEATURES.index(cell.name), (*RUNNERS, "any").index(cell.runner), MODES.index(cell.mode)


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
    return [Fact(**{**fact, "cell": _cell(fact["cell"])}) for fact in stored]


def _cell(stored: dict[str, Any]) -> Cell | Feature:
    return Cell(**stored) if "family" in stored else Feature(**stored)
