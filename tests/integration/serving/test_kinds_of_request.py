"""Requests of other kinds: of a prompt alone, of several samples, and beams, which are refused."""

from __future__ import annotations

import pytest

from tests.integration.offline.reading import Case, counter
from tests.integration.serving.judging import decided
from tests.integration.serving.lives import CHILDREN, LifeEngines

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("way", ["steady", "async"])
def test_rules_of_the_prompt_decide_a_request_of_one_token_once(
    life_engines: LifeEngines, way: str
) -> None:
    case = life_engines.case("lives", way, "prompt-only")
    [batch] = case["batches"]
    assert counter(case, "tokens_evaluated_total", phase="output") == 0
    for output in batch:
        own = decided(case, output)
        assert own
        assert set(own.values()) == {1}
        assert all(position < len(output["prompt"]) for _, _, position, _ in own)
        assert output["prompt_logprobs"] == len(output["prompt"])


@pytest.mark.parametrize("way", ["steady", "async"])
@pytest.mark.parametrize("number", [1, 5])
def test_a_block_in_the_prompt_withholds_the_only_token(
    life_engines: LifeEngines, way: str, number: int
) -> None:
    case = life_engines.case("lives", way, "prompt-only")
    output = case["batches"][0][number]
    [sample] = output["samples"]
    assert (sample["tokens"], sample["logprobs"]) == ([], [])
    assert sample["finish_reason"] == "content_filter"
    assert sample["stop_reason"] == "moe_guard:stop-prompt/stop-prompt"


def _children(life_engines: LifeEngines) -> Case:
    return life_engines.case("lives", "steady", "children")


def test_a_block_of_one_sample_leaves_its_siblings_alone(life_engines: LifeEngines) -> None:
    case = _children(life_engines)
    [whole], [met] = case["batches"]
    blocked = [s for s in met["samples"] if s["finish_reason"] == "content_filter"]
    assert 0 < len(blocked) < CHILDREN == len(met["samples"])
    for sample, uncut in zip(met["samples"], whole["samples"], strict=True):
        if sample in blocked:
            assert sample["tokens"] == uncut["tokens"][: len(sample["tokens"])]
            assert len(sample["tokens"]) < len(uncut["tokens"])
        else:
            assert sample == uncut


def test_each_sample_is_a_request_with_decisions_of_its_own(life_engines: LifeEngines) -> None:
    case = _children(life_engines)
    _, [met] = case["batches"]
    blocked = [s for s in met["samples"] if s["finish_reason"] == "content_filter"]
    fired = sorted(p for _, rule, p, _ in decided(case, met).elements() if rule == "stop")
    assert fired == sorted(len(met["prompt"]) + len(s["tokens"]) - 1 for s in blocked)
    assert counter(case, "requests_total") == 2 * CHILDREN
    assert counter(case, "requests_total", outcome="blocked") == len(blocked)
    prompts = 2 * CHILDREN * len(met["prompt"])
    assert counter(case, "tokens_evaluated_total", phase="prompt") == prompts


def test_beam_search_is_refused_under_rules_that_only_observe(life_engines: LifeEngines) -> None:
    """Each of its steps is a request whose prompt is what the beam has so far."""
    tried = life_engines.result("lives", "watching")["beam_search"]
    assert tried["error"] == "BeamSearchError"
    assert "output would be judged as prompt" in tried["message"]


def test_beam_search_runs_as_without_the_guard_where_there_is_no_rule(
    life_engines: LifeEngines,
) -> None:
    armed, off = (life_engines.result("lives", way)["beam_search"] for way in ("armed", "off"))
    assert armed == off
    assert [len(tokens) for tokens in armed["tokens"]] == [7, 7]
