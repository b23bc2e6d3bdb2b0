"""How a real engine's traffic uses experts: counted as the guard's own sets count it, and shown."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.integration.offline.engines import MODES, Engines
from tests.integration.offline.reading import counted_selections, counter
from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS, TOP_K

pytestmark = pytest.mark.vllm

CASES = [(mode, name) for mode in MODES for name in ("unmasked", "masked")] + [
    (mode, name) for mode in ("eager", "v2") for name in ("midway", "blocks", "long")
]


def _by_expert(load: dict[str, Any]) -> Counter[tuple[int, int]]:
    return Counter(
        {
            (layer["layer"], expert): count
            for layer in load["layers"]
            for expert, count in enumerate(layer["counts"])
        }
    )


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_where_each_step_is_sampled_each_computed_token_is_counted_once(
    engines: Engines, mode: str, name: str
) -> None:
    case = engines.case(f"{mode}-guarded", "main", name)
    before, after = case["load"]
    assert after["sampled_every"] == 1
    assert [layer["layer"] for layer in after["layers"]] == list(range(NUM_LAYERS))
    assert {len(layer["counts"]) for layer in after["layers"]} == {NUM_EXPERTS}
    cached = sum(output["cached"] for batch in case["batches"] for output in batch)
    assert bool(cached) == (name == "midway")
    tokens = after["tokens"] - before["tokens"]
    assert tokens == counter(case, "tokens_evaluated_total") - cached > 0
    moved = _by_expert(after)
    moved.subtract(_by_expert(before))
    assert sum(moved.values()) == tokens * NUM_LAYERS * TOP_K
    if not cached:
        assert +moved == counted_selections(case)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_guard_counts_is_shown_to_prometheus(engines: Engines, mode: str) -> None:
    result = engines.result(f"{mode}-guarded", "main")
    cases = list(result["cases"].values())
    shown = cases[-1]["shown"]
    for layer in range(NUM_LAYERS):
        effective = shown[f"layer_effective_experts{{layer={layer}}}"]
        assert 1 <= effective <= NUM_EXPERTS
        assert 1 / NUM_EXPERTS <= shown[f"layer_max_share{{layer={layer}}}"] <= 1 / TOP_K
        assert shown[f"layer_entropy_nats{{layer={layer}}}"] > 0
        assert 0 <= shown[f"layer_divergence_nats{{layer={layer}}}"] < 0.7
    # Engines that ran earlier in the same process may have told of theirs.
    told = shown["load_tokens_total{}"] - cases[0]["shown"]["load_tokens_total{}"]
    counted = cases[-1]["load"][1]["tokens"]
    assert 0 < told <= counted, "the answer to the last question is still to come"
    assert shown["steps_total{}"] > 0
    for part in ("begin", "end", "report", "ledger"):
        assert shown[f"host_seconds_total{{part={part}}}"] > 0, part


@pytest.mark.parametrize("group", ["tp2", "v2-pp2"])
def test_ranks_count_each_token_once(engines: Engines, group: str) -> None:
    before, after = engines.case(group, "main", "unmasked")["load"]
    tokens = after["tokens"] - before["tokens"]
    assert after["sampled_every"] == 8
    assert tokens > 0
    assert len(after["layers"]) == NUM_LAYERS
    moved = _by_expert(after)
    moved.subtract(_by_expert(before))
    for layer in range(NUM_LAYERS):
        assert sum(moved[layer, expert] for expert in range(NUM_EXPERTS)) == tokens * TOP_K
