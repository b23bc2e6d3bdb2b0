"""Speculative decoding and async scheduling: every accepted token counts once, nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.engines import PLACES
from tests.integration.offline.reading import (
    Case,
    counted_selections,
    counter,
    decisions,
    flagged,
    rows,
    selections,
)
from tests.integration.serving.engines import AHEAD, RUNNERS, SPECULATING, ServingEngines
from tests.support.support_recorder import SupportRecord
from tests.support.tiny_models import NUM_LAYERS

pytestmark = pytest.mark.vllm

GUESSING = [(runner, way) for runner in RUNNERS for way in SPECULATING[runner]]
SCHEDULING = [(runner, way) for runner in RUNNERS for way in AHEAD[runner]]
CASES = ("text", "midway", "blocks", "prompt-blocks")

_NGRAM, _ASYNC = "speculative decoding: n-gram", "async scheduling"
SHOWN = {
    "ngram": [_NGRAM],
    "draft": ["speculative decoding: draft model"],
    "async": [_ASYNC],
    "async-ngram": [_NGRAM, _ASYNC],
}
"""What each way of serving shows, in the words of the support table."""


def _outputs(case: Case) -> list[dict[str, Any]]:
    return [output for batch in case["batches"] for output in batch]


def _last_position(output: dict[str, Any], sample: dict[str, Any]) -> int:
    """The last token given is not fed back; where a block withheld one, it was."""
    blocked = sample["finish_reason"] == "content_filter"
    return len(output["prompt"]) + len(sample["tokens"]) - (1 if blocked else 2)


def _accepted(case: Case, output: dict[str, Any]) -> list[list[Any]]:
    """What was computed last at each position that counts: a rejected draft is computed over."""
    latest = {row[0]: row for row in rows(case, output)}
    [sample] = output["samples"]
    return [row for position, row in latest.items() if position <= _last_position(output, sample)]


@pytest.mark.parametrize(("runner", "way"), GUESSING)
def test_some_drafts_are_accepted_and_some_are_not(
    engines: ServingEngines, runner: str, way: str
) -> None:
    case = engines.case(runner, way, "text")
    drafted, accepted = (
        counter(case, f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")
    )
    assert 0 < accepted < drafted
    positions = [[row[0] for row in rows(case, output)] for output in _outputs(case)]
    assert any(len(set(own)) < len(own) for own in positions), "none was computed over"


@pytest.mark.parametrize(("runner", "way"), GUESSING + SCHEDULING)
@pytest.mark.parametrize("name", CASES)
def test_each_accepted_token_is_judged_once(
    engines: ServingEngines, runner: str, way: str, name: str, support_record: SupportRecord
) -> None:
    for feature in SHOWN[way]:
        support_record.feature(feature, runner=PLACES[runner][0])
    case = engines.case(runner, way, name)
    sampled = [(output, sample) for output in _outputs(case) for sample in output["samples"]]
    prompt = sum(len(output["prompt"]) for output, _ in sampled)
    fed_back = sum(
        max(0, _last_position(output, sample) + 1 - len(output["prompt"])) for output, sample in sampled
    )
    assert counter(case, "tokens_evaluated_total", phase="prompt") == prompt
    assert counter(case, "tokens_evaluated_total", phase="output") == fed_back
    assert counter(case, "requests_total") == len(sampled)
    assert counter(case, "failures_total") == counter(case, "events_dropped_total") == 0


@pytest.mark.parametrize(("runner", "way"), GUESSING)
@pytest.mark.parametrize("name", ["text", "midway"])
def test_selections_are_those_of_the_target_model_at_accepted_tokens(
    engines: ServingEngines, runner: str, way: str, name: str
) -> None:
    case = engines.case(runner, way, name)
    seen = selections(row for output in _outputs(case) for row in _accepted(case, output))
    if name == "midway":  # the later prompts are the texts of the first two, and in part cached
        for again, first in zip(_outputs(case)[2:], _outputs(case), strict=False):
            assert again["cached"] > 0
            seen += selections(row for row in _accepted(case, first) if row[0] < again["cached"])
    assert {layer for layer, _ in seen} == set(range(NUM_LAYERS))
    assert counted_selections(case) == seen


@pytest.mark.parametrize("way", SPECULATING["v2"])
def test_greedy_requests_decide_at_the_positions_at_which_they_do_without_drafts(
    engines: ServingEngines, way: str
) -> None:
    """Beside sampled ones. On V1's CPU build, vLLM's own greedy drafts go astray in such a batch; a
    greedy request alone is compared below."""
    fast, plain = engines.case("v2", way, "text"), engines.case("v2", "plain", "text")
    greedy = [i for i in range(8) if i % 4 < 2]
    for i in greedy:
        one, other = fast["batches"][0][i], plain["batches"][0][i]
        assert one["samples"][0]["tokens"] == other["samples"][0]["tokens"]
        assert _facts(fast, one) == _facts(plain, other)


def _facts(case: Case, output: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {
        (
            decision["policy"],
            decision["rule"],
            decision["mode"],
            decision["phase"],
            decision["position"],
            decision["outcome"],
            *((e["value"], e["threshold"]) for e in decision["evidence"]),
        )
        for decision in case["decisions"]
        if decision["request_id"] == output["request_id"]
    }


@pytest.mark.parametrize(("runner", "way"), GUESSING + SCHEDULING)
@pytest.mark.parametrize("variant", [0, 1])
def test_a_block_gives_what_it_gives_without_drafts_and_one_step_at_a_time(
    engines: ServingEngines, runner: str, way: str, variant: int, support_record: SupportRecord
) -> None:
    for feature in SHOWN[way]:
        support_record.feature(feature, runner=PLACES[runner][0])
    """The token sampled at the position that fired is withheld, and all accepted after it."""
    fast, plain = (engines.case(runner, w, "blocks") for w in (way, "plain"))
    [output], [expected] = fast["batches"][variant], plain["batches"][variant]
    [sample], [whole] = output["samples"], expected["samples"]
    assert sample["finish_reason"] == "content_filter"
    assert sample["tokens"] == whole["tokens"]
    assert len(sample["logprobs"]) == len(sample["tokens"])
    assert _facts(fast, output) == _facts(plain, expected)


@pytest.mark.parametrize(("runner", "way"), GUESSING + SCHEDULING)
def test_every_block_is_told_once_at_the_last_token_given(
    engines: ServingEngines, runner: str, way: str
) -> None:
    case = engines.case(runner, way, "blocks")
    for output in _outputs(case):
        fired = decisions(case, output, "stop", "block")
        given = sorted(len(output["prompt"]) + len(s["tokens"]) - 1 for s in output["samples"])
        assert sorted(decision["position"] for decision in fired) == given
        assert {decision["outcome"] for decision in fired} == {"blocked"}


@pytest.mark.parametrize(("runner", "way"), GUESSING)
def test_a_mask_starts_at_the_first_position_computed_after_it_fired(
    engines: ServingEngines, runner: str, way: str
) -> None:
    case = engines.case(runner, way, "midway")
    for output in case["batches"][0]:
        [fired] = decisions(case, output, "late")
        own = rows(case, output)
        # A draft that was rejected there is judged when its position is computed over, by a later step.
        step = max(i for i, row in enumerate(own) if row[0] == fired["position"])
        # The step that fired was computed without the mask; its rows follow one another.
        end = step + 1
        while end < len(own) and own[end][0] == own[end - 1][0] + 1 and end - step <= 3:
            end += 1
        accepted = {row[0]: row for row in own}
        masked = [row for p, row in accepted.items() if p > own[end - 1][0]]
        assert len(masked) > 5
        assert flagged(masked) == 0


@pytest.mark.parametrize(("runner", "way"), SCHEDULING)
@pytest.mark.parametrize("name", CASES)
def test_scheduled_ahead_the_outcome_is_the_same_to_the_last_bit(
    engines: ServingEngines, runner: str, way: str, name: str
) -> None:
    ahead, plain = (engines.case(runner, w, name) for w in (way, "plain"))
    for output, expected in zip(_outputs(ahead), _outputs(plain), strict=True):
        assert output["samples"] == expected["samples"]
        assert _facts(ahead, output) == _facts(plain, expected)
    assert ahead["counters"] == plain["counters"]


@pytest.mark.parametrize(("runner", "way"), SCHEDULING)
def test_what_a_step_in_flight_computed_for_a_blocked_request_is_dropped(
    engines: ServingEngines, runner: str, way: str
) -> None:
    case = engines.case(runner, way, "blocks")
    judged = sum(len(own) for own in case["rows"].values())
    counted = counter(case, "tokens_evaluated_total")
    assert judged >= counted + len(case["rows"]), "each request had a step in flight"
