"""Evidence by KV slot: whose it is, and when it counts as seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from guard.device.kept_evidence import KeptEvidence
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.program import SignalTable, SparseWeights
from guard.program.step_report import EventColumn, RequestColumn, StepReport
from tests.unit.device.driving import (
    COUNT,
    FLAGGED,
    OTHER,
    TOPOLOGY,
    Engine,
    fired,
    policy_text,
    rule_text,
    tokens,
)

CPU = torch.device("cpu")
MASS = "{mass: {experts: f, over: token, above: 0.1}}"


def signals(*largest: float) -> SignalTable:
    """A unit signal for each number, that weight on every expert, and one mass signal."""
    everyone = np.arange(len(TOPOLOGY.layers) * TOPOLOGY.max_experts, dtype=np.int32)

    def weights(*values: float) -> SparseWeights:
        return SparseWeights(
            np.arange(len(values) + 1) * len(everyone),
            np.tile(everyone, len(values)),
            np.repeat(np.array(values), len(everyone)),
        )

    keys = tuple(map(str, range(2 + len(largest))))
    return SignalTable(
        weights(*largest), weights(1.0), np.ones(len(keys)), keys, epochs=(0,) * len(keys)
    )


def store() -> KeptEvidence:
    return KeptEvidence(signals(1.0), TOPOLOGY, 3, 2, CPU)


def rows(*values: int) -> torch.Tensor:
    return torch.tensor([[1, value, 10 * value] for value in values])


def kept(evidence: KeptEvidence, *slots: int) -> list[list[int]]:
    found: list[list[int]] = evidence.read(torch.tensor(slots)).tolist()
    return found


def test_what_was_written_under_a_slot_is_read_there_and_nothing_elsewhere() -> None:
    evidence = store()
    evidence.write(torch.tensor([4, 1]), rows(7, 8))

    assert kept(evidence, 0, 1, 4) == [[0, 0, 0], [1, 8, 80], [1, 7, 70]]


def test_padding_leaves_no_trace() -> None:
    evidence = store()
    evidence.write(torch.tensor([-1, 5, -1], dtype=torch.int32), rows(7, 8, 9))

    assert kept(evidence, *range(6)) == [[0, 0, 0]] * 5 + [[1, 8, 80]]


def test_a_block_that_is_handed_out_holds_nothing_until_it_is_written() -> None:
    evidence = store()
    evidence.write(torch.tensor([2, 3, 4]), rows(5, 6, 7))
    evidence.forget([1])
    evidence.apply_staged_writes()
    assert kept(evidence, 2, 3, 4) == [[0, 0, 0], [0, 0, 0], [1, 7, 70]]

    evidence.write(torch.tensor([3]), rows(9))
    assert kept(evidence, 2, 3) == [[0, 0, 0], [1, 9, 90]]


def test_a_copied_block_takes_its_evidence_along_in_the_order_of_the_calls() -> None:
    evidence = store()
    evidence.write(torch.tensor([0, 1, 4, 5]), rows(1, 2, 5, 6))
    evidence.forget([2])
    evidence.copy([0], [2])
    evidence.forget([0])
    evidence.apply_staged_writes()

    assert kept(evidence, 0, 1, 4, 5) == [[0, 0, 0], [0, 0, 0], [1, 1, 10], [1, 2, 20]]


def test_everything_can_be_forgotten_at_once() -> None:
    evidence = store()
    evidence.write(torch.arange(6), rows(*range(6)))
    evidence.forget_all()

    assert kept(evidence, *range(6)) == [[0, 0, 0]] * 6


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(1.0, torch.int16), (10_000.0, torch.int32), (2.0**40, torch.int64)],
)
def test_unit_signals_take_the_narrowest_type_that_holds_a_token(
    largest: float, dtype: torch.dtype
) -> None:
    evidence = KeptEvidence(signals(1.0, largest), TOPOLOGY, 2, 2, CPU)

    assert evidence.narrow_KX.dtype == dtype
    value = int(largest) * sum(layer.top_k for layer in TOPOLOGY.layers)
    evidence.write(torch.tensor([3]), torch.tensor([[1, 1, -value, 2**50]]))
    assert kept(evidence, 3) == [[1, 1, -value, 2**50]]
    token = KeptEvidence.token_bytes(signals(1.0, largest), TOPOLOGY)
    assert evidence.num_bytes == 5 * token


class CachingEngine(Engine):
    """An engine whose requests have blocks of 4 tokens."""

    def __init__(self) -> None:
        super().__init__(policy_text(rule_text(COUNT)))
        evidence = self.guard.keep_evidence(8, 4)
        assert evidence is not None
        self.evidence = evidence

    def run(
        self,
        req_id: str,
        start: int,
        experts: list[int],
        blocks: list[int],
        rejected: int | None = None,
    ) -> StepReport:
        slots = [blocks[p // 4] * 4 + p % 4 for p in range(start, start + len(experts))]
        stock = self.guard.begin_step

        def begin_step(*args: object) -> None:
            stock(*args)  # type: ignore[arg-type]
            self.guard.place_rows(torch.tensor(slots))

        self.guard.begin_step = begin_step  # type: ignore[method-assign, assignment]
        report = self.step({req_id: (start, experts)}, None if rejected is None else [rejected])
        self.guard.begin_step = stock  # type: ignore[method-assign]
        return report


def unseen(report: StepReport) -> int:
    return int(report.requests_B[0, RequestColumn.UNSEEN])


def test_a_request_without_a_slot_leaves_evidence_for_others() -> None:
    engine = CachingEngine()
    engine.run("nobody", 0, [OTHER, OTHER, FLAGGED, OTHER], [3])
    engine.guard.add_request("b", 6)
    engine.guard.take_from_cache("b", [3, 4], 4)
    report = engine.run("b", 4, [OTHER, OTHER], [3, 4])

    assert fired(report) == [("b", 2)]
    assert (tokens(report), unseen(report)) == ((6, 0), 0)


def test_firings_of_a_cached_prefix_that_have_no_evidence_are_their_requests_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for judge in ("evaluate", "kernels.native.judge"):
        monkeypatch.setattr(f"guard.device.{judge}.MAX_EVENTS_PER_STEP", 1)
    engine = CachingEngine()
    engine.guard.add_request("a", 9)
    engine.run("a", 0, [FLAGGED, OTHER, FLAGGED, OTHER, FLAGGED, OTHER, FLAGGED, OTHER], [3, 4])
    engine.guard.add_request("b", 9)
    engine.guard.take_from_cache("b", [3, 4, 5], 8)
    stock = engine.guard.begin_step

    def begin_step(*args: object) -> None:
        stock(*args)  # type: ignore[arg-type]
        engine.guard.place_rows(torch.tensor([24, 20]))

    engine.guard.begin_step = begin_step  # type: ignore[method-assign, assignment]
    report = engine.step({"a": (8, [OTHER]), "b": (8, [FLAGGED])})

    columns = [EventColumn.REQUEST, EventColumn.POSITION]
    assert report.num_events == 5
    assert report.events_V[:, columns].tolist() == [[1, 0], [1, 8]]
    assert report.more_events_V[:, columns].tolist() == [[1, 2], [1, 4], [1, 6]]


def test_a_rejected_draft_leaves_no_evidence() -> None:
    engine = CachingEngine()
    engine.guard.add_request("a", 2)
    engine.run("a", 0, [OTHER, OTHER], [3])
    engine.run("a", 2, [OTHER, FLAGGED], [3], rejected=1)

    assert kept(engine.evidence, 14)[0][0] == 1
    assert kept(engine.evidence, 15)[0][0] == 0


def test_a_step_whose_rows_have_no_place_is_not_judged() -> None:
    engine = CachingEngine()
    engine.guard.add_request("a", 2)

    assert engine.step({"a": (0, [OTHER, OTHER])}).failed


def test_a_prefix_taken_in_a_failed_step_stays_unseen() -> None:
    engine = CachingEngine()
    engine.run("nobody", 0, [FLAGGED] * 4, [3])
    engine.guard.add_request("b", 6)
    engine.guard.take_from_cache("b", [3, 4], 4)
    engine.guard.blind = True
    engine.run("b", 4, [OTHER], [3, 4])
    engine.guard.blind = False
    report = engine.run("b", 5, [OTHER], [3, 4])

    assert (fired(report), unseen(report)) == ([], 5)


def test_a_resumed_request_is_not_judged_again_on_what_it_finds_in_the_cache() -> None:
    engine = CachingEngine()
    engine.guard.add_request("a", 5)
    first = engine.run("a", 0, [FLAGGED, OTHER, FLAGGED, OTHER, OTHER], [3, 4])
    assert fired(first) == [("a", 0), ("a", 2)]
    engine.guard.take_from_cache("a", [3, 4], 4)
    again = engine.run("a", 4, [OTHER, FLAGGED], [3, 5])

    assert fired(again) == [("a", 5)]
    assert (tokens(again), unseen(again)) == ((0, 1), 0)


def test_a_prefix_from_before_a_reload_was_seen_by_signals_that_stayed_and_by_no_new_one() -> None:
    engine = CachingEngine()
    engine.run("nobody", 0, [FLAGGED, OTHER, OTHER, FLAGGED], [3])
    used = "{count: {experts: f, over: request, atLeast: 2}}"
    new = rule_text("{count: {experts: g, over: request, atLeast: 1}}", name="new")
    text = policy_text(rule_text(COUNT) + rule_text(used, name="used") + new)
    text = text.replace("experts: {f:", "experts: {g: [{layer: 1, experts: [7]}], f:")
    program = compile_policies(parse_policies(text), TOPOLOGY, engine.guard.program)
    engine.guard.install(engine.guard.prepare(program))
    engine.guard.add_request("b", 6)
    engine.guard.take_from_cache("b", [3, 4], 4)
    report = engine.run("b", 4, [OTHER, OTHER], [3, 4])

    names = [program.rules[event[EventColumn.RULE]].rule for event in report.events_V]
    at = [position for _, position in fired(report)]
    late = [int(event[EventColumn.UNSEEN]) for event in report.events_V]
    assert list(zip(names, at, late, strict=True)) == [
        ("r", 0, 0),
        ("r", 3, 0),
        ("used", 3, 0),
        ("new", 4, 4),
    ]
    assert unseen(report) == 0
    assert report.requests_B[0, RequestColumn.LATE] == 4


def test_columns_of_signals_that_are_gone_are_taken_by_new_ones_before_more_memory_is() -> None:
    evidence = store()
    narrow, wide = evidence.narrow_KX, evidence.wide_KX
    evidence.write(torch.tensor([4]), rows(7))
    for generation in range(1, 9):
        keys = ("tokens", f"unit@{generation}", "2")
        table = replace(signals(1.0), keys=keys, epochs=(0, generation, 0))
        table = replace(
            table,
            scale=np.ones(4),
            keys=("tokens@0", "tokens@1", *keys[1:]),
            epochs=(0, generation, generation, 0),
        )
        evidence.install(evidence.prepare(table, generation))
        assert kept(evidence, 4) == [[1, 0, 0, 70]], "of before, and in a column that another had"
    assert (evidence.narrow_KX, evidence.wide_KX) == (narrow, wide)


def test_evidence_moves_to_more_room_with_what_it_holds() -> None:
    evidence = store()
    evidence.write(torch.tensor([4]), rows(7))
    wider = replace(
        signals(1.0, *range(2, 8), 10_000.0),
        keys=("t", "1", *map(str, range(10, 17)), "2"),
        epochs=(0,) * 10,
    )
    prepared = evidence.prepare(wider, 0)
    assert prepared.room is not None
    evidence.install(prepared)

    found = kept(evidence, 4)[0]
    assert (found[0], found[1], found[-1]) == (1, 7, 70)
    assert evidence.narrow_KX.dtype == torch.int32
