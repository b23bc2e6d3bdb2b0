"""The running check against a slow loop, and what follows from its findings within the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.device.check import CHECK_EVERY_STEPS, LivenessCheck
from guard.device.layout import Capacity
from guard.device.rows import StepBatch
from guard.device.tap import RoutingTap
from guard.program.program import MaskMethodCode, MaskRelease, MaskTable
from guard.program.step_report import Finding, RequestColumn, RoutingCheck, StepReport
from guard.program.topology import MoELayer, Topology
from tests.unit.device.driving import COUNT, FLAGGED, MASK, OTHER, Engine, policy_text, rule_text

LAYERS = (MoELayer(1, 6, 2), MoELayer(4, 4, 3))
TOPOLOGY = Topology("TestMoeForCausalLM", LAYERS)
METHODS = tuple(MaskMethodCode)
IDS = (-3, -1, 0, 1, 2, 3, 4, 5, 6, 1000)
WEIGHTS = (0.0, 0.5, 1.0, -0.25, math.nan, math.inf)


def masks_of(methods: Sequence[MaskMethodCode], named: np.ndarray) -> MaskTable:
    """named: bool [L, E, A]."""
    num_words = max(1, -(-len(methods) // 64))
    bits = np.zeros((*named.shape[:2], num_words), dtype=np.uint64)
    for action in range(len(methods)):
        bit = np.uint64(1 << (action % 64))
        bits[..., action // 64] |= np.where(named[..., action], bit, np.uint64(0))
    return MaskTable(
        rule=np.arange(len(methods)),
        method=np.array(methods, dtype=np.int64),
        release=np.full(len(methods), MaskRelease.REQUEST_END, dtype=np.int64),
        tokens=np.zeros(len(methods), dtype=np.int64),
        static=np.ones(len(methods), dtype=np.bool_),
        expert_bits=bits.view(np.int64),
    )


def expected(
    ids: np.ndarray, weights: np.ndarray, in_force: np.ndarray, masks: MaskTable, named: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """findings [T, L, F], violations [T, L], violations [T, A]: a row, a layer, an action at a time."""
    num_rows, num_actions = in_force.shape
    findings = np.zeros((num_rows, len(LAYERS), Finding.NUM), dtype=np.bool_)
    by_layer = np.zeros((num_rows, len(LAYERS)), dtype=np.int64)
    by_action = np.zeros((num_rows, num_actions), dtype=np.int64)
    for t in range(num_rows):
        for index, layer in enumerate(LAYERS):
            row = list(zip(ids[t, index, : layer.top_k], weights[t, index], strict=False))
            of_model = [(e, w) for e, w in row if 0 <= e < layer.num_experts]
            working = [e for e, w in of_model if math.isfinite(w) and w != 0]
            here = findings[t, index]
            here[Finding.MISSING] = any(e == -1 for e, _ in row)
            here[Finding.OUT_OF_RANGE] = any(e < -1 or e >= layer.num_experts for e, _ in row)
            here[Finding.NOT_FINITE] = any(not math.isfinite(w) for _, w in of_model)
            here[Finding.DUPLICATE] = len(set(working)) < len(working)
            actions = [a for a in range(num_actions) if in_force[t, a]]
            excluding = [a for a in actions if masks.method[a] != MaskMethodCode.FORCE]
            for e in working:
                guilty = [a for a in excluding if named[index, e, a]]
                by_layer[t, index] += bool(guilty)
                by_action[t, guilty] += 1
            if here[Finding.MISSING] or here[Finding.OUT_OF_RANGE]:
                continue
            for e in range(layer.num_experts):
                forcing = [a for a in actions if a not in excluding and named[index, e, a]]
                excluded = any(named[index, e, a] for a in excluding)
                if forcing and not excluded and e not in [chosen for chosen, _ in row]:
                    by_layer[t, index] += 1
                    by_action[t, forcing] += 1
    return findings, by_layer, by_action


@given(st.data(), st.integers(0, 2**32))
def test_findings_are_those_of_a_loop_over_rows_layers_and_actions(
    data: st.DataObject, seed: int
) -> None:
    random = Random(seed)
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    num_actions = data.draw(st.sampled_from([0, 1, 3, 66]))
    methods = [random.choice(METHODS) for _ in range(num_actions)]
    wild = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    num_rows, padding = sum(counts), 2
    named = np.array(
        [[[random.random() < 0.3 for _ in methods] for _ in range(6)] for _ in LAYERS], dtype=np.bool_
    ).reshape(len(LAYERS), 6, num_actions)
    named[1, 4:] = False
    masks = masks_of(methods, named)
    in_force = np.array(
        [[random.random() < 0.5 for _ in methods] for _ in range(num_rows)], dtype=np.bool_
    ).reshape(num_rows, num_actions)
    tap = RoutingTap(TOPOLOGY, Capacity(32, 4), torch.device("cpu"))
    for index, layer in enumerate(LAYERS):
        rows = range(num_rows + padding)
        ids = [random.sample(range(layer.num_experts), layer.top_k) for _ in rows]
        ids = [[random.choice(IDS) if random.random() < wild else e for e in row] for row in ids]
        weights = [
            [random.choice(WEIGHTS) if random.random() < wild else 0.5 for _ in row] for row in ids
        ]
        tap.record(index, torch.tensor(ids), torch.tensor(weights))
    starts = torch.from_numpy(np.cumsum([0, *counts]))
    batch = StepBatch.of(torch.arange(1, len(counts) + 1), starts, torch.arange(num_rows))
    check = LivenessCheck(TOPOLOGY, masks, torch.device("cpu"))
    check.is_due = True

    found, trusted = check.check(tap, batch, torch.from_numpy(in_force) if num_actions else None)

    ids_TLK = tap.topk_ids_TLK[:num_rows].numpy()
    findings, by_layer, by_action = expected(
        ids_TLK, tap.topk_weights_TLK[:num_rows].numpy(), in_force, masks, named
    )
    request = np.repeat(np.arange(len(counts)), counts)
    silent = (ids_TLK == -1).all(axis=(0, 2))
    assert found is not None
    assert found.findings_LF.tolist() == findings.sum(axis=0).tolist()
    assert found.silent_L.tolist() == silent.tolist()
    assert found.violations_L.tolist() == by_layer.sum(axis=0).tolist()
    for of_request, of_row in (
        (found.findings_BF, findings.sum(axis=1)),
        (found.violations_BA, by_action),
    ):
        assert of_request.tolist() == [
            of_row[request == number].sum(axis=0).tolist() for number in range(len(counts))
        ]
    is_sound = ~findings.any(axis=(1, 2)) & ~silent.any()
    assert trusted.expand(num_rows, 1)[:, 0].tolist() == is_sound.tolist()


class FaultyEngine(Engine):
    """Steps of one row, of which a layer may not report, or may report something else."""

    silent_layer: int | None = None
    reported: tuple[list[int], list[float]] | None = None
    position = 0

    def one(self, expert: int = OTHER) -> StepReport:
        stock = self.guard.tap.record

        def record(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
            if layer == self.silent_layer:
                return
            if self.reported is not None and layer == 0:
                ids, weights = (torch.tensor([values]) for values in self.reported)
            stock(layer, ids, weights)

        self.guard.tap.record = record  # type: ignore[assignment]
        report = self.step({"a": (self.position, [expert])})
        self.guard.tap.record = stock  # type: ignore[method-assign]
        self.position += 1
        return report

    def until_checked(self, expert: int = OTHER) -> RoutingCheck:
        for _ in range(CHECK_EVERY_STEPS):
            check = self.one(expert).check
            if check is not None:
                return check
        raise AssertionError("no step of a whole period was checked")


def engine(then: str = MASK, when: str = "{always: {}}") -> FaultyEngine:
    made = FaultyEngine(policy_text(rule_text(when, then)))
    made.guard.add_request("a", 1)
    return made


def test_the_first_step_and_then_one_in_so_many_is_checked() -> None:
    running = engine()
    checked = [running.one().check is not None for _ in range(2 * CHECK_EVERY_STEPS)]
    assert checked == ([True] + [False] * (CHECK_EVERY_STEPS - 1)) * 2
    assert CHECK_EVERY_STEPS <= 50


def test_a_sound_step_has_no_findings_however_it_is_padded() -> None:
    running = engine()
    check = running.until_checked()
    assert not check.findings_LF.any()
    assert not check.findings_BF.any()
    assert not check.silent_L.any()
    assert not check.violations_BA.any()
    assert check.layers == (0, 1)


def test_what_a_layer_reported_in_an_earlier_step_does_not_pass_for_this_steps() -> None:
    running = engine()
    running.one()
    running.silent_layer = 1
    assert running.until_checked().silent_L.tolist() == [False, True]


def test_while_a_layer_is_silent_nothing_is_judged_and_afterwards_judging_goes_on() -> None:
    running = engine(then="", when=COUNT)
    running.one()
    running.silent_layer = 1
    running.until_checked(FLAGGED)
    blind = running.one(FLAGGED)
    assert blind.num_events == 0
    assert blind.requests_B[0, RequestColumn.OUTPUT_TOKENS] == 0
    assert blind.requests_B[0, RequestColumn.UNSEEN] == 2
    running.silent_layer = None
    assert not running.until_checked().silent_L.any()
    seen = running.one(FLAGGED)
    assert seen.num_events == 1
    assert seen.requests_B[0, RequestColumn.OUTPUT_TOKENS] == 1


@pytest.mark.parametrize(
    ("reported", "finding"),
    [
        (([OTHER, -1], [0.5, 0.5]), Finding.MISSING),
        (([OTHER, 8], [0.5, 0.5]), Finding.OUT_OF_RANGE),
        (([OTHER, -2], [0.5, 0.5]), Finding.OUT_OF_RANGE),
        (([OTHER, 7], [math.nan, 0.5]), Finding.NOT_FINITE),
        (([OTHER, 7], [0.5, -math.inf]), Finding.NOT_FINITE),
        (([OTHER, OTHER], [0.5, 0.5]), Finding.DUPLICATE),
    ],
)
def test_a_row_that_cannot_be_true_is_not_judged_and_its_neighbour_is(
    reported: tuple[list[int], list[float]], finding: int
) -> None:
    running = engine()
    running.reported = reported
    report = running.one()
    assert report.check is not None
    assert np.flatnonzero(report.check.findings_LF[0]).tolist() == [finding]
    assert np.flatnonzero(report.check.findings_BF[0]).tolist() == [finding]
    assert not report.check.findings_LF[1].any()
    assert not report.check.silent_L.any()
    assert report.requests_B[0, RequestColumn.UNSEEN] == 1
    running.reported = None
    assert running.one().requests_B[0, RequestColumn.OUTPUT_TOKENS] == 1


def test_ids_that_no_table_has_break_no_step_that_is_not_checked() -> None:
    running = engine(then="", when="{mass: {experts: f, over: token, above: 0.1}}")
    running.one()
    running.reported = ([1_000_000, FLAGGED], [0.5, math.nan])
    report = running.one()
    assert report.check is None
    assert not report.failed


@pytest.mark.parametrize(
    ("expert", "violations"), [(OTHER, [[0]]), (FLAGGED, [[1]])], ids=["obeyed", "ignored"]
)
def test_a_masked_expert_at_work_is_a_violation_of_its_action(
    expert: int, violations: list[list[int]]
) -> None:
    check = engine().until_checked(expert)
    assert check.violations_BA.tolist() == violations
    assert check.violations_L.tolist() == [violations[0][0], 0]
    assert not check.findings_LF.any(), "what is seen is seen as it is"


def test_a_mask_that_is_lost_before_the_forward_is_seen_to_be_violated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = engine()
    mask, stock = running.guard.mask, running.guard.begin_step
    assert mask is not None

    def begin_step(*args: Any) -> None:
        stock(*args)
        mask.clear_rows()

    monkeypatch.setattr(running.guard, "begin_step", begin_step)
    assert running.until_checked(FLAGGED).violations_BA.tolist() == [[1]]


def test_an_unmasked_request_violates_nothing() -> None:
    running = FaultyEngine(policy_text(rule_text("{always: {}}", MASK), mode="audit"))
    running.guard.add_request("a", 1)
    assert running.until_checked(FLAGGED).violations_BA.tolist() == [[0]]


def test_a_forced_expert_that_is_left_out_is_a_violation() -> None:
    running = engine(then="{mask: {experts: f, method: force}}")
    assert running.until_checked(OTHER).violations_BA.tolist() == [[1]]
    assert running.until_checked(FLAGGED).violations_BA.tolist() == [[0]]
