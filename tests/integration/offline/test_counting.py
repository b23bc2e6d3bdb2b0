"""Every real token is judged once, and how a prompt is chunked changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.engines import MODES, PLACES, Engines
from tests.integration.offline.reading import Case, counter, flagged, rows
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

EAGER = ("eager", "v2")


def _fed_back(sample: dict[str, Any]) -> int:
    """Generated tokens that became input: all but the last, or all where a block withheld one."""
    blocked = sample["finish_reason"] == "content_filter"
    return max(0, len(sample["tokens"]) - (0 if blocked else 1))


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, name) for mode in MODES for name in ("unmasked", "masked")]
    + [(mode, name) for mode in EAGER for name in ("blocks", "prompt-blocks", "midway", "long")],
)
def test_tokens_evaluated_are_prompts_and_what_was_fed_back(
    engines: Engines, mode: str, name: str
) -> None:
    _assert_each_token_counted_once(engines.case(f"{mode}-guarded", "main", name))


def _assert_each_token_counted_once(case: Case) -> None:
    outputs = [output for batch in case["batches"] for output in batch]
    sampled = [(output, sample) for output in outputs for sample in output["samples"]]
    prompt = sum(len(output["prompt"]) for output, _ in sampled)
    assert counter(case, "tokens_evaluated_total", phase="prompt") == prompt
    assert counter(case, "tokens_evaluated_total", phase="output") == sum(
        _fed_back(sample) for _, sample in sampled
    )


@pytest.mark.parametrize("mode", EAGER)
def test_chunked_prompts_give_the_same_decisions_at_the_same_positions(
    engines: Engines, mode: str, support_record: SupportRecord
) -> None:
    support_record.feature("chunked prefill", runner=PLACES[mode][0])
    whole = engines.case(f"{mode}-guarded", "main", "long")
    chunked = engines.case(f"{mode}-guarded", "chunked", "long")
    facts = [
        [
            [
                (d["policy"], d["rule"], d["phase"], d["position"], d["evidence"], d["outcome"])
                for d in case["decisions"]
                if d["request_id"] == output["request_id"]
            ]
            for [output] in case["batches"]
        ]
        for case in (whole, chunked)
    ]
    assert facts[0] == facts[1]
    in_prompt = {p for request in facts[0] for *_, phase, p, _, _ in request if phase == "prompt"}
    assert any(position > 64 for position in in_prompt), "some shall fire in a later chunk"
    for [output], [chunked_output] in zip(whole["batches"], chunked["batches"], strict=True):
        for sample, other in zip(output["samples"], chunked_output["samples"], strict=True):
            assert sample["tokens"] == other["tokens"]
            assert sample["stop_reason"] == other["stop_reason"]
    _assert_each_token_counted_once(chunked)


@pytest.mark.parametrize("mode", EAGER)
def test_what_is_computed_again_after_preemption_is_judged_once_and_masked_again(
    engines: Engines, mode: str, support_record: SupportRecord
) -> None:
    support_record.feature("preemption and recompute", runner=PLACES[mode][0])
    case = engines.case(f"{mode}-guarded", "crowded", "crowd")
    positions = [[row[0] for row in judged] for judged in case["rows"].values()]
    assert any(len(set(own)) < len(own) for own in positions), "nothing was preempted"
    _assert_each_token_counted_once(case)
    for i, output in enumerate(case["batches"][0]):
        assert (flagged(rows(case, output)) == 0) == bool(i % 2)


@pytest.mark.parametrize("mode", EAGER)
def test_a_prompt_in_chunks_of_any_size_is_decided_as_in_one(engines: Engines, mode: str) -> None:
    case = engines.case(f"{mode}-guarded", "chunked", "every-chunk")
    seen = [
        (
            output["samples"][0]["tokens"],
            rows(case, output),
            [
                (d["policy"], d["rule"], d["phase"], d["position"], d["evidence"], d["outcome"])
                for d in case["decisions"]
                if d["request_id"] == output["request_id"]
            ],
        )
        for [output] in case["batches"]
    ]
    in_one = seen[-1]
    assert {decision[2] for decision in in_one[2]} == {"prompt", "output"}
    assert seen == [in_one] * len(seen)
    _assert_each_token_counted_once(case)
