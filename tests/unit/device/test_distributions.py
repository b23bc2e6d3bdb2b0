"""Conditions on distributions, on the device: values by hand, and what a request keeps for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from guard.device.distributions import pack_experts, unpack_experts
from guard.device.kept_evidence import KeptEvidence
from guard.device.layout import Capacity
from guard.device.state import SlotState
from guard.policy.fault import Location, PolicyError
from guard.policy.model import (
    Baselines,
    Comparison,
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Observe,
    Policy,
    PolicySet,
    Reduce,
    Rule,
    Window,
)
from guard.policy.model import NamedWindow as Named
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.topology import MoELayer, Topology
from tests.unit.device.driving import OTHER, TOPOLOGY, Engine

HERE = Location("policy.yaml", 7, 11)
ENTROPY, CONCENTRATION, DIVERGENCE = (
    ConditionKind.ENTROPY,
    ConditionKind.CONCENTRATION,
    ConditionKind.DIVERGENCE,
)
UNIFORM = Baselines(None, {0: (0.25,) * 8, 1: (0.25,) * 8})


def rule(kind: ConditionKind, over: Window, reduce: Reduce = Reduce.MAX) -> Rule:
    """Always known to be beyond its threshold, so it fires as soon as there is a value."""
    baselines = UNIFORM if kind is DIVERGENCE else None
    when = Condition(
        kind, kind, HERE, over=over, comparison=Comparison.AT_LEAST, baselines=baselines, reduce=reduce
    )
    return Rule(f"{kind}-{over}", when, Observe(), HERE)


def compiled(*rules: Rule, topology: Topology = TOPOLOGY) -> Program:
    return compile_policies(PolicySet((Policy("p", HERE, rules=rules),), "0"), topology)


class Running(Engine):
    """Two layers of 8 experts; each row goes to one expert and to expert 7."""

    def __init__(self, *rules: Rule, drafts: int = 0) -> None:
        super().__init__(
            "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec: {rules: []}\n",
            compiled=compiled(*rules),
            max_draft_tokens=drafts,
        )
        self.guard.add_request("a", 3)

    def choose_otherwise_in_layer_1(self) -> None:
        stock = self.guard.tap.record

        def record(layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
            stock(layer, (ids * (1 + 2 * layer)) % 8, weights)

        self.guard.tap.record = record  # type: ignore[assignment]

    def reload(self, *rules: Rule) -> None:
        policies = PolicySet((Policy("p", HERE, rules=rules),), "1")
        program = compile_policies(policies, TOPOLOGY, self.guard.program)
        self.guard.install(self.guard.prepare(program))

    def place_next(self, kv_slots: Sequence[int]) -> None:
        """Where the next step writes its rows' KV."""
        stock = self.guard.begin_step

        def begin_step(*arguments: Any) -> None:
            self.guard.begin_step = stock  # type: ignore[method-assign]
            stock(*arguments)
            self.guard.place_rows(torch.tensor(kv_slots))

        self.guard.begin_step = begin_step  # type: ignore[method-assign, assignment]

    def values(self, start: int, experts: Sequence[int], rejected: int | None = None) -> list[float]:
        """The values with which the rules fire in the request's next step, by name of the rule."""
        # What still holds fires again.
        self.guard._state.active_SR.zero_()
        report = self.step({"a": (start, experts)}, None if rejected is None else [rejected])
        return [float(values[0]) for values in report.values_V]


def test_a_prompt_is_judged_at_its_end_however_it_was_chunked() -> None:
    # Each layer: experts 1, 2, 2 and three times 7: 1 / (1/36 + 4/36 + 9/36) = 36/14.
    whole, chunked = (Running(rule(ENTROPY, Named.PROMPT), rule(ENTROPY, 2)) for _ in range(2))
    expected = [36 / 14, 1 / (4 / 16 + 4 / 16)]
    assert whole.values(0, [1, 2, 2]) == pytest.approx(expected)
    assert chunked.values(0, [1]) == []
    assert chunked.values(1, [2]) == []
    assert chunked.values(2, [2]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("over", "experts"),
    [
        (Named.TOKEN, [4]),
        (Named.OUTPUT, [3, 4]),
        (Named.PROMPT, [1, 2, 2]),
        (Named.REQUEST, [1, 2, 2, 3, 4]),
        (3, [2, 3, 4]),
        (30, [1, 2, 2, 3, 4]),
    ],
)
def test_every_window_ends_at_the_row(over: Window, experts: list[int]) -> None:
    kinds = (ENTROPY, CONCENTRATION, DIVERGENCE)
    # All windows at once, so that their histograms and tokens are shared.
    others = [rule(ENTROPY, window) for window in (*Named, 3, 30) if window != over]
    running = Running(*(rule(kind, over) for kind in kinds), *others)
    running.values(0, [1, 2, 2])
    running.values(3, [3])
    values = running.values(4, [4])[: len(kinds)]

    counts = np.bincount([*experts, *[7] * len(experts)], minlength=8)
    p, q = counts / counts.sum(), np.full(8, 1 / 8)
    mean = (p + q) / 2
    of_p = sum(a * math.log(a / m) for a, m in zip(p, mean, strict=True) if a)
    of_q = sum(a * math.log(a / m) for a, m in zip(q, mean, strict=True))
    expected = [1 / (p * p).sum(), p.max() * 8 / 2, (of_p + of_q) / 2]
    assert values == pytest.approx(expected, rel=1e-13)


def test_layers_taken_in_groups_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [
        rule(DIVERGENCE, Named.REQUEST, Reduce.MEAN),
        rule(DIVERGENCE, 4),
        rule(ENTROPY, 2),
        rule(ENTROPY, Named.OUTPUT),
    ]
    steps = [(0, [1, 2, 2]), (3, [3, 5, 5]), (5, [6, 1])]
    together = Running(*rules, drafts=2)
    together.choose_otherwise_in_layer_1()
    expected = [together.values(start, experts, 1 if start else 0) for start, experts in steps]
    monkeypatch.setattr("guard.device.distributions._NUMBERS_AT_ONCE", 1)
    apart = Running(*rules, drafts=2)
    apart.choose_otherwise_in_layer_1()

    assert [apart.values(start, experts, 1 if start else 0) for start, experts in steps] == expected
    assert all(expected)


def test_each_accepted_draft_has_the_distribution_up_to_it() -> None:
    running = Running(rule(ENTROPY, Named.OUTPUT), drafts=3)
    running.values(0, [1, 2, 2])
    report = running.step({"a": (3, [3, 4, 4, 5])}, [1])
    # Two drafts are accepted. Experts 3, 7, then 3, 4, 7, 7, then 3, 4, 4, 7, 7, 7: the second value is
    # the furthest beyond the threshold, and the first where both drafts are taken back.
    values = [2.0, 1 / (1 / 16 + 1 / 16 + 1 / 4), 1 / (1 / 36 + 4 / 36 + 9 / 36)]
    assert values[0] < values[2] < values[1]
    assert report.extremes_BC[0, 0] == pytest.approx(values[1])
    assert report.drafts is not None
    assert report.drafts.extremes_BKC[0, :, 0].tolist() == pytest.approx(
        [values[1], values[0], values[0]]
    )


def test_a_preempted_request_is_not_counted_twice_and_a_slot_forgets_its_last_owner() -> None:
    running = Running(rule(ENTROPY, Named.REQUEST), rule(ENTROPY, 4))
    running.values(0, [1, 2, 2])
    running.values(3, [3])
    again = running.values(0, [1, 2, 2, 3, 4])
    counts = np.bincount([1, 2, 2, 3, 4, *[7] * 5])
    recent = np.bincount([2, 2, 3, 4, *[7] * 4])
    assert again == pytest.approx(
        [counts.sum() ** 2 / (counts**2).sum() for counts in (counts, recent)]
    )

    running.guard.finish_requests(["a"])
    running.guard.add_request("a", 3)
    assert running.values(0, [OTHER] * 3) == pytest.approx([2.0, 2.0])


def _effective(*experts: int) -> float:
    counts = np.bincount([*experts, *[7] * len(experts)])
    return float(counts.sum() ** 2 / (counts**2).sum())


def test_after_a_reload_a_window_that_was_there_goes_on_and_a_new_one_begins() -> None:
    running = Running(rule(ENTROPY, Named.REQUEST), rule(ENTROPY, 3))
    running.values(0, [1, 2, 2])
    running.values(3, [3])
    windows: list[Window] = [Named.OUTPUT, Named.REQUEST, 9, 3]
    running.reload(*(rule(ENTROPY, window) for window in windows))

    assert running.values(4, [4]) == pytest.approx(
        [_effective(4), _effective(1, 2, 2, 3, 4), _effective(4), _effective(2, 3, 4)]
    )
    running.reload(rule(ENTROPY, 9), rule(ENTROPY, 3), rule(ENTROPY, Named.REQUEST))
    assert running.values(5, [5]) == pytest.approx(
        [_effective(4, 5), _effective(3, 4, 5), _effective(1, 2, 2, 3, 4, 5)]
    )


def test_cached_tokens_count_for_the_windows_that_saw_them() -> None:
    running = Running(rule(ENTROPY, Named.REQUEST))
    running.guard.keep_evidence(4, 4)
    running.place_next([4, 5, 6, 7])
    running.step({"nobody": (0, [1, 2, 3, 4])})
    running.guard.finish_requests(["a"])
    windows: list[Window] = [Named.REQUEST, Named.PROMPT, 5]
    running.reload(*(rule(ENTROPY, window) for window in windows))
    running.place_next([8, 9, 10, 11])
    running.step({"nobody": (0, [5, 5, 5, 5])})

    for block, experts in ((1, [1, 2, 3, 4]), (2, [5, 5, 5, 5])):
        running.guard.add_request("a", 6)
        running.guard.take_from_cache("a", [block, 3], 4)
        running.place_next([12, 13])
        values = running.values(4, [6, 2])
        later = [6, 2] if block == 1 else [*experts, 6, 2]
        expected = [_effective(*experts, 6, 2), _effective(*later), _effective(*later[-5:])]
        assert values == pytest.approx(expected)
        running.guard.finish_requests(["a"])


def test_cached_experts_stay_readable_when_the_window_that_first_asked_for_them_goes() -> None:
    experts = ExpertSet("f", (ExpertEntry((0,), {3: 1.0}, HERE),), HERE)
    mass = Rule("mass", Condition(ConditionKind.MASS, "mass", HERE, experts), Observe(), HERE)
    running = Running(mass, rule(ENTROPY, Named.REQUEST))
    running.guard.keep_evidence(4, 4)
    running.reload(mass, rule(ENTROPY, Named.REQUEST), rule(ENTROPY, Named.PROMPT))
    running.place_next([4, 5, 6, 7])
    running.step({"nobody": (0, [1, 2, 3, 4])})
    running.guard.finish_requests(["a"])
    running.reload(rule(ENTROPY, Named.PROMPT))

    running.guard.add_request("a", 6)
    running.guard.take_from_cache("a", [1, 3], 4)
    running.place_next([12, 13])
    assert running.values(4, [6, 2]) == pytest.approx([_effective(1, 2, 3, 4, 6, 2)])


def test_a_token_of_a_failed_step_is_in_no_window_nor_is_an_older_one_in_its_place() -> None:
    running = Running(rule(ENTROPY, 3), rule(ENTROPY, Named.OUTPUT))
    running.values(0, [1, 2, 2])
    running.values(3, [3])
    running.guard.blind = True
    assert running.step({"a": (4, [4])}).failed
    running.guard.blind = False

    assert running.values(5, [5]) == pytest.approx([_effective(3, 5), _effective(3, 5)])


@pytest.mark.parametrize(("num_experts", "dtype"), [(255, np.uint8), (256, np.int16)])
def test_experts_take_the_narrowest_type_and_come_back_as_they_were(
    num_experts: int, dtype: type[np.generic]
) -> None:
    topology = Topology("X", tuple(MoELayer(n, num_experts, 3) for n in range(5)))
    table = compiled(rule(ENTROPY, 2), topology=topology).distributions
    assert table.expert_type == dtype
    names = torch.arange(2 * 15).reshape(2, 15) % (num_experts + 1)
    names[0, 0] = num_experts
    packed = pack_experts(names.to(getattr(torch, table.expert_type.name)), table.routing_words)

    assert packed.shape == (2, -(-15 * np.dtype(dtype).itemsize // 8))
    assert torch.equal(unpack_experts(packed, table).to(torch.int64), names)


def test_the_bytes_that_are_stated_are_those_that_are_kept() -> None:
    with_none = compiled(rule(ConditionKind.ALWAYS, Named.REQUEST))
    program = compiled(rule(ENTROPY, Named.REQUEST), rule(ENTROPY, Named.OUTPUT), rule(ENTROPY, 9))
    slots = Capacity(64, 3)
    state, before = (SlotState(p, slots, torch.device("cpu")) for p in (program, with_none))
    kept = [state.histogram_SHLE, state.recent_chosen_SQC, state.recent_position_SQ]
    kept.append(state.recent_epoch_SQ)
    assert program.distribution_bytes.slot == sum(tensor.nbytes for tensor in kept) // 4
    assert program.distribution_bytes.slot == 2 * 4 * 2 * 8 + 8 * (2 * 2 + 8 + 4)
    assert not before.histogram_SHLE.numel() + before.recent_chosen_SQC.numel()
    assert with_none.distribution_bytes == (0, 0)

    def token_bytes(of: Program) -> int:
        return KeptEvidence.token_bytes(of.signals, of.topology)

    assert program.distribution_bytes.cached_token == 8  # two layers, two experts of a byte, in words
    assert token_bytes(program) == token_bytes(with_none) + 4 * 8  # room for columns comes in fours


def test_a_window_of_more_tokens_than_a_request_may_keep_is_refused() -> None:
    large = Topology("X", tuple(MoELayer(n, 384, 8) for n in range(61)))
    compiled(rule(ENTROPY, 531), topology=large)
    with pytest.raises(PolicyError) as caught:
        compiled(rule(ENTROPY, 64), rule(DIVERGENCE, 532), topology=large)

    (fault,) = caught.value.faults
    assert fault.location == HERE
    assert "`divergence` over 532 tokens" in fault.message
    assert "524,628 bytes" in fault.message
    assert "at most 531 tokens" in fault.message
