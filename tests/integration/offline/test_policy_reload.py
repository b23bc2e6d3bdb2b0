"""Policies change between two steps of a running engine: of one worker, and of two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import ENFORCED_FROM, ENFORCED_UNTIL
from tests.integration.offline.engines import Engines
from tests.integration.offline.policies import FLAGGED
from tests.integration.offline.reading import counter, decisions, facts, rows, samples

pytestmark = pytest.mark.vllm

GROUPS = ("eager-guarded", "v2-guarded", "tp2")


def reloads(engines: Engines, group: str) -> dict[str, Any]:
    return engines.case(group, "main" if group == "tp2" else "chunked", "reloads")


@pytest.mark.parametrize("group", GROUPS)
def test_a_mask_holds_in_the_very_steps_in_which_its_policy_is_enforced(
    engines: Engines, group: str
) -> None:
    case = reloads(engines, group)
    for output in case["batches"][0]:
        prompt = len(output["prompt"])
        masked = range(prompt + ENFORCED_FROM - 1, prompt + ENFORCED_UNTIL - 1)
        recorded = rows(case, output)
        used = {p for p, ids in recorded if any(set(layer) & set(FLAGGED) for layer in ids)}
        assert {p for p, _ in recorded} == set(range(prompt + 19))
        assert not used & set(masked)
        assert {masked[0] - 1, masked[-1] + 1} & used, "nothing to mask"
        assert output["samples"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("group", GROUPS)
def test_each_decision_names_the_revision_that_made_it(engines: Engines, group: str) -> None:
    case = reloads(engines, group)
    for output in case["batches"][0]:
        first, second = decisions(case, output, "isolate")
        prompt = len(output["prompt"])
        assert (first["position"], first["outcome"], first["unseen_tokens"]) == (0, "observed", 0)
        at = prompt + ENFORCED_FROM - 1
        assert (second["position"], second["outcome"], second["unseen_tokens"]) == (at, "masked", 0)
        assert first["revision"] != second["revision"]
        others = [d for d in case["decisions"] if d["policy"] == "watch"]
        assert {d["revision"] for d in others} <= {first["revision"], second["revision"]}
    assert counter(case, "reloads_total", result="success") == 2
    assert counter(case, "requests_total", outcome="masked") == 2
    assert counter(case, "failures_total") == 0


def test_two_ranks_change_between_the_same_two_steps_as_one_worker(engines: Engines) -> None:
    """A rank that had another revision than the other in some step would differ from it there, which
    counts as a failure and makes its requests unjudged."""
    alone, two = (reloads(engines, group) for group in ("eager-guarded", "tp2"))
    assert [s["tokens"] for s in samples(two)] == [s["tokens"] for s in samples(alone)]
    assert facts(two) == facts(alone)
    assert two["counters"] == alone["counters"]
