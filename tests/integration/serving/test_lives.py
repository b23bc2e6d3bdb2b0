"""Requests come, go, are cancelled and are preempted: each is judged as if it were alone, to the last
token that counts, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.integration.offline.reading import Case, counter
from tests.integration.serving.judging import (
    Output,
    decided,
    facts,
    must_decide,
    must_end,
    num_counted,
    outputs,
    policy_set,
    selections_of_flagged,
)
from tests.integration.serving.lives import CANCELLED, REQUESTS, WAYS, LifeEngines, cases_of
from tests.support.support_facts import Runner
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

CASES = [
    (group, way, case["name"])
    for group, way in WAYS
    for case in cases_of(group, way)
    if case.get("stepped")
]
COMPARED = {
    "reused": (4, 6, 7),
    "short": range(0, REQUESTS, 5),
    "cancelled": (13, 22),
    "structured": (2, 7),
    "prompt-only": (0, 1, 4),
}
"""Requests of each case: the reference is slow."""

JUDGED = [names for names in CASES if names[2] in COMPARED]
CANCELLING = [(group, way) for group, way, name in CASES if name == "cancelled"]


def _enforced(group: str, way: str, name: str) -> list[list[str]]:
    [case] = [case for case in cases_of(group, way) if case["name"] == name]
    requests = [request for batch in case["batches"] for request in batch]
    return [
        list(request["sampling"].get("extra_args", {}).get("moe_guard_enforce", ()))
        for request in requests
    ]


def _read(
    engines: LifeEngines, group: str, way: str, name: str
) -> tuple[Case, list[tuple[Output, list[str]]]]:
    """A case, and each of its outputs with the policies that the request asked for."""
    case = engines.case(group, way, name)
    asked = _enforced(group, way, name)
    return case, list(zip(outputs(case), asked, strict=True))


@pytest.mark.parametrize(("group", "way", "name"), JUDGED)
def test_decisions_are_those_that_the_reference_makes_of_the_recorded_routing(
    life_engines: LifeEngines, group: str, way: str, name: str
) -> None:
    policies = policy_set(life_engines.folder / "lives")
    case, read = _read(life_engines, group, way, name)
    for output, enforced in [read[i] for i in COMPARED[name]]:
        assert decided(case, output) == must_decide(policies, case, output, enforced)


@pytest.mark.parametrize(("group", "way", "name"), CASES)
def test_counters_are_exact(life_engines: LifeEngines, group: str, way: str, name: str) -> None:
    policies = policy_set(life_engines.folder / "lives")
    case, read = _read(life_engines, group, way, name)
    prompt = sum(min(num_counted(output), len(output["prompt"])) for output, _ in read)
    total = sum(num_counted(output) for output, _ in read)
    assert counter(case, "tokens_evaluated_total", phase="prompt") == prompt
    assert counter(case, "tokens_evaluated_total", phase="output") == total - prompt
    assert counter(case, "decisions_total") == len(case["decisions"])
    assert sum(sum(decided(case, output).values()) for output, _ in read) == len(case["decisions"])
    assert counter(case, "failures_total") == counter(case, "events_dropped_total") == 0
    ended = Counter(must_end(policies, case, output, enforced) for output, enforced in read)
    outcomes = ("passed", "observed", "unjudged", "masked", "blocked")
    assert ended == +Counter(
        {outcome: int(counter(case, "requests_total", outcome=outcome)) for outcome in outcomes}
    )
    for layer, selected in selections_of_flagged(case).items():
        assert (
            counter(case, "expert_selections_total", policy="layers", set=f"layer-{layer}") == selected
        )


@pytest.mark.parametrize(("group", "way", "name"), CASES)
def test_every_slot_comes_back(life_engines: LifeEngines, group: str, way: str, name: str) -> None:
    case = life_engines.case(group, way, name)
    for output in outputs(case):
        slots = output["slots"]
        assert slots["free"] == slots["all"]
        assert slots["followed"] == slots["awaiting"] == 0


@pytest.mark.parametrize(("group", "way", "name"), CASES)
def test_the_engine_core_keeps_nothing_of_requests_that_ended(
    life_engines: LifeEngines, group: str, way: str, name: str
) -> None:
    for output in outputs(life_engines.case(group, way, name)):
        assert not any(output["books"].values()), output["books"]


@pytest.mark.parametrize(("way", "name"), [("steady", "reused"), ("async", "backwards")])
def test_ten_requests_for_each_slot_get_what_each_gets_alone(
    life_engines: LifeEngines, way: str, name: str, support_record: SupportRecord
) -> None:
    """Tokens, decisions and evidence, whoever had the slot before and whoever is beside it."""
    support_record.feature("ten requests for each slot", runner="v1")
    together = life_engines.case("lives", way, name)
    alone = life_engines.case("lives", "steady", "one-by-one")
    ended = outputs(together) if name == "reused" else outputs(together)[::-1]
    assert len(ended) == REQUESTS >= 10 * ended[0]["slots"]["all"]
    assert counter(together, "vllm:num_preemptions_total") > 0
    for output, expected in zip(ended, outputs(alone), strict=True):
        assert output["prompt"] == expected["prompt"]
        assert _text(output) == _text(expected)
        assert facts(together, output) == facts(alone, expected)


@pytest.mark.parametrize("way", ["steady", "async"])
def test_preempted_by_more_urgent_ones_a_request_gets_what_it_gets_alone(
    life_engines: LifeEngines, way: str
) -> None:
    case = life_engines.case("lives", way, "urgent")
    *alone, together = case["batches"]
    assert counter(case, "vllm:num_preemptions_total") >= 3
    for output, [expected] in zip(together, alone, strict=True):
        assert _text(output) == _text(expected)
        assert facts(case, output) == facts(case, expected)


def _text(output: Output) -> tuple[Any, ...]:
    [sample] = output["samples"]
    return sample["tokens"], sample["finish_reason"], sample["stop_reason"]


@pytest.mark.parametrize(("group", "way"), CANCELLING)
def test_requests_were_cancelled_in_each_state(life_engines: LifeEngines, group: str, way: str) -> None:
    case = life_engines.case(group, way, "cancelled")
    ended = case["batches"][1]
    assert {i for i, output in enumerate(ended) if output["cancelled"]} == CANCELLED.keys()
    state = {i: ended[i]["cancelled"] for i in CANCELLED}
    assert state[3]["status"] == "PREEMPTED"
    assert state[9]["status"] == "WAITING"
    assert 0 < state[4]["counted"] < len(ended[4]["prompt"])
    if way == "async":
        assert all(state[i]["in_flight"] > 0 for i in (1, 2, 4, 5, 10)), "a step was under way"
    assert counter(case, "vllm:num_preemptions_total") > 0


@pytest.mark.parametrize(("group", "way"), CANCELLING)
def test_neighbours_of_cancelled_requests_get_the_same_tokens_and_decisions(
    life_engines: LifeEngines, group: str, way: str
) -> None:
    case = life_engines.case(group, way, "cancelled")
    whole, ended = case["batches"]
    for i in range(len(whole)):
        if i not in CANCELLED:
            assert _text(ended[i]) == _text(whole[i])
            assert facts(case, ended[i]) == facts(case, whole[i])


@pytest.mark.parametrize(("group", "way"), CANCELLING)
def test_a_cancelled_request_has_the_decisions_up_to_its_end_and_none_after(
    life_engines: LifeEngines, group: str, way: str, support_record: SupportRecord
) -> None:
    runner: Runner = "v2" if group.startswith("v2") else "v1"
    for feature in ("cancelled requests", "priority scheduling"):
        support_record.feature(feature, runner=runner)
    case = life_engines.case(group, way, "cancelled")
    whole, ended = case["batches"]
    for i in CANCELLED:
        last = num_counted(ended[i]) - 1
        before = [fact for fact in facts(case, whole[i]) if fact[4] <= last]
        assert facts(case, ended[i]) == before
        [sample], [expected] = ended[i]["samples"], whole[i]["samples"]
        assert sample["tokens"] == expected["tokens"][: len(sample["tokens"])]


@pytest.mark.parametrize(("group", "way"), CANCELLING)
@pytest.mark.parametrize(("number", "rule"), [(1, "stop"), (2, "late")])
def test_what_fires_in_the_step_of_a_cancellation_is_not_told(
    life_engines: LifeEngines, group: str, way: str, number: int, rule: str
) -> None:
    case = life_engines.case(group, way, "cancelled")
    whole, ended = (batch[number] for batch in case["batches"])
    [position] = [p for _, name, p, _ in decided(case, whole) if name == rule]
    assert num_counted(ended) == position, "it was cancelled in the step that fired"
    assert not [name for _, name, *_ in decided(case, ended) if name == rule]
    assert ended["samples"][0]["stop_reason"] is None
