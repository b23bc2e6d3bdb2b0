"""How often experts were chosen: every back end counts as a loop over the choices does."""

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

from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.layout import Capacity
from guard.device.load import ExpertLoad, LoadReading
from guard.device.rows import StepBatch
from guard.device.tap import RoutingTap
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard
from tests.support.no_waiting import NoWaiting
from tests.unit.device.driving import BLOCK, COUNT, FLAGGED, OTHER, Engine, policy_text, rule_text

LAYERS = (MoELayer(1, 6, 2), MoELayer(4, 4, 3))
TOPOLOGY = Topology("TestMoeForCausalLM", LAYERS)
IDS = (-3, -1, 0, 1, 2, 3, 4, 5, 6, 1000)
WEIGHTS = (0.0, 0.5, -0.25, math.nan, math.inf)
PADDING = 2

BACK_ENDS = ["native", "torch", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def made(back_end: str, topology: Topology = TOPOLOGY, every: int = 1) -> ExpertLoad:
    with pytest.MonkeyPatch.context() as patch:
        if back_end == "torch":
            patch.setenv(KERNELS_VARIABLE, "torch")
        load = ExpertLoad(topology, torch.device("cuda" if back_end == "cuda" else "cpu"), every)
    assert (load._native is not None) == (back_end == "native")
    return load


def expected(
    ids: np.ndarray,
    weights: np.ndarray,
    counts: Sequence[int],
    slots: Sequence[int],
    positions: Sequence[int],
    rejected: Sequence[int],
    next_position: Sequence[int],
    trusted: Sequence[bool],
) -> tuple[int, np.ndarray]:
    """A row, a layer, a choice at a time."""
    found = np.zeros((len(LAYERS), TOPOLOGY.max_experts), dtype=np.int64)
    num_rows, row = 0, 0
    for request, count in enumerate(counts):
        for place in range(count):
            is_counted = (
                slots[request] != 0
                and place < count - rejected[request]
                and positions[row] >= next_position[slots[request]]
                and trusted[row]
            )
            if is_counted:
                num_rows += 1
                for index, layer in enumerate(LAYERS):
                    for choice in range(TOPOLOGY.max_top_k):
                        expert = ids[row, index, choice]
                        if 0 <= expert < layer.num_experts and weights[row, index, choice] != 0:
                            found[index, expert] += 1
            row += 1
    return num_rows, found


@given(st.data(), st.integers(0, 2**32))
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_counts_are_those_of_a_loop(back_end: str, data: st.DataObject, seed: int) -> None:
    random = Random(seed)
    load = made(back_end)
    device = load.counts.device
    total, found = 0, np.zeros((len(LAYERS), TOPOLOGY.max_experts), dtype=np.int64)
    for _ in range(2):
        counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        num_rows = sum(counts)
        shape = (num_rows + PADDING, len(LAYERS), TOPOLOGY.max_top_k)
        ids = np.array([random.choice(IDS) for _ in range(math.prod(shape))], np.int32).reshape(shape)
        weights = np.array([random.choice(WEIGHTS) for _ in range(ids.size)], np.float32).reshape(shape)
        slots = [random.choice([0, 1, 2, 3]) for _ in counts]
        starts = [random.randrange(4) for _ in counts]
        positions = [s + i for s, c in zip(starts, counts, strict=True) for i in range(c)]
        next_position = [0, *(random.randrange(6) for _ in range(3))]
        has_rejected, trusts_one_by_one = random.random() < 0.5, random.random() < 0.5
        rejected = [random.randrange(c) if has_rejected else 0 for c in counts]
        trusted = [random.random() < 0.7 for _ in positions]
        if not trusts_one_by_one:
            trusted = trusted[:1] * num_rows
        tap = RoutingTap(TOPOLOGY, Capacity(32, 4), device)
        tap.topk_ids_TLK[: shape[0]] = torch.from_numpy(ids).to(device)
        tap.topk_weights_TLK[: shape[0]] = torch.from_numpy(weights).to(device)
        batch = StepBatch.of(
            torch.tensor(slots).to(device),
            torch.from_numpy(np.cumsum([0, *counts])).to(device),
            torch.tensor(positions).to(device),
        )
        trusted_T1 = torch.tensor(trusted)[:, None] if trusts_one_by_one else torch.tensor(trusted[0])

        load.add(
            tap,
            batch,
            torch.tensor(next_position).to(device),
            torch.tensor(rejected).to(device) if has_rejected else None,
            trusted_T1.to(device),
        )

        rows, step = expected(ids, weights, counts, slots, positions, rejected, next_position, trusted)
        total, found = total + rows, found + step

    reading = load.read()
    assert reading.tokens == total
    np.testing.assert_array_equal(reading.counts_LE, found)


def test_many_rows_are_counted_in_parts(back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.device.load._ROWS_AT_ONCE", 3)
    load = made(back_end)
    device = load.counts.device
    tap = RoutingTap(TOPOLOGY, Capacity(8, 4), device)
    tap.topk_ids_TLK[:7, 0, 0], tap.topk_weights_TLK[:7] = 5, 1.0
    starts_B1, position_T = torch.tensor([0, 7]).to(device), torch.arange(7).to(device)
    batch = StepBatch.of(torch.tensor([1]).to(device), starts_B1, position_T)

    trusted = torch.ones((), dtype=torch.bool, device=device)
    load.add(tap, batch, torch.zeros(2, dtype=torch.int64, device=device), None, trusted)

    assert load.read().tokens == 7
    assert load.read().counts_LE.tolist() == [[0, 0, 0, 0, 0, 7], [0] * 6]


def test_no_step_waits_for_its_counts() -> None:
    load = made("torch")
    tap = RoutingTap(TOPOLOGY, Capacity(8, 4), torch.device("cpu"))
    batch = StepBatch.of(torch.tensor([1]), torch.tensor([0, 7]), torch.arange(7))
    trusted, next_S = torch.ones((), dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    rejected_B = torch.tensor([1])
    with NoWaiting():
        load.add(tap, batch, next_S, rejected_B, trusted)
    assert load.read().tokens == 6


def driven(text: str, *, load_every: int, max_draft_tokens: int = 0) -> Engine:
    engine = Engine(text, max_draft_tokens=max_draft_tokens)
    capacity = engine.guard.capacity
    engine.guard = Guard(engine.program, capacity, torch.device("cpu"), load_every=load_every)
    return engine


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "torch":
        monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    return name


def numbers(reading: LoadReading | None) -> tuple[int, list[list[int]]] | None:
    return None if reading is None else (reading.tokens, reading.counts_LE.tolist())


def chosen(reading: LoadReading) -> dict[int, int]:
    """Of the first layer, by expert."""
    return {expert: count for expert, count in enumerate(reading.counts_LE[0].tolist()) if count}


@pytest.mark.parametrize(("every", "sampled"), [(1, 9), (2, 5), (8, 2), (0, 0)])
def test_a_step_in_so_many_is_counted_the_first_one_among_them(
    kernels: str, every: int, sampled: int
) -> None:
    engine = driven(policy_text(rule_text(COUNT)), load_every=every)
    engine.guard.add_request("a", 1)
    for position in range(9):
        report = engine.step({"a": (position, [OTHER])})
        assert not report.failed

    reading = engine.guard.load.read()
    assert reading.tokens == sampled
    assert chosen(reading) == ({OTHER: sampled, 7: sampled} if sampled else {})
    if kernels == "native":
        assert numbers(engine.guard.load.poll()) == numbers(reading)


def test_only_real_rows_count_and_each_once(kernels: str) -> None:
    engine = driven(policy_text(rule_text(COUNT)), load_every=1)
    guard = engine.guard
    guard.add_request("a", 3)
    engine.step({"a": (0, [FLAGGED, OTHER, OTHER])})
    # Preempted and computed again, with a row behind; a request that nobody admitted beside it.
    engine.step({"a": (0, [FLAGGED, OTHER, OTHER, FLAGGED]), "stranger": (0, [FLAGGED])})
    guard.idle()  # dummy rows
    guard.tap.record(0, torch.full((4, 2), FLAGGED), torch.ones(4, 2))

    reading = guard.load.read()
    assert reading.tokens == 4
    assert chosen(reading) == {FLAGGED: 2, OTHER: 2, 7: 4}


def test_drafts_that_were_not_accepted_do_not_count() -> None:
    engine = driven(policy_text(rule_text(COUNT)), load_every=1, max_draft_tokens=3)
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [OTHER, OTHER, FLAGGED, FLAGGED])}, rejected=[2])

    assert chosen(engine.guard.load.read()) == {OTHER: 2, 7: 2}


def test_a_blind_step_counts_nothing(kernels: str) -> None:
    engine = driven(policy_text(rule_text(COUNT)), load_every=1)
    engine.guard.add_request("a", 1)
    engine.guard.blind = True
    engine.step({"a": (0, [OTHER])})
    assert engine.guard.load.read().tokens == 0


def test_it_goes_on_under_the_program_that_follows(kernels: str) -> None:
    engine = driven(policy_text(rule_text(COUNT)), load_every=1)
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [OTHER])})
    later = compile_policies(
        parse_policies(policy_text(rule_text(COUNT, BLOCK))), engine.program.topology, engine.program
    )
    engine.guard.install(engine.guard.prepare(later))
    engine.step({"a": (1, [OTHER])})
    assert chosen(engine.guard.load.read()) == {OTHER: 2, 7: 2}


def test_a_fault_in_it_leaves_the_step_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    engine = driven(policy_text(rule_text(COUNT)), load_every=1)
    engine.guard.add_request("a", 1)
    monkeypatch.setattr(engine.guard.load, "add", broken)
    report = engine.step({"a": (0, [FLAGGED])})

    assert not report.failed
    assert report.num_events == 1
    assert report.failures == {"metrics": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_poll_gives_what_was_there_at_the_one_before() -> None:
    load = made("cuda")
    load.counts += 1
    assert load.poll() is None
    torch.cuda.synchronize()
    load.counts += 1
    assert numbers(load.poll()) == (1, [[1] * 6] * 2)
    torch.cuda.synchronize()
    assert numbers(load.poll()) == (2, [[2] * 6] * 2)
    assert load.read().tokens == 2
