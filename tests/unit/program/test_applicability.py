"""Which rules apply to a request, and which of them an exception holds back."""

from __future__ import annotations

import hashlib
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy.fault import Location
from guard.policy.model import Mode, OnError, Phase, PolicyException, RequestMatch, Severity
from guard.program.applicability import (
    MOST_KNOWN_FACTS,
    RequestFacts,
    RulesByFacts,
    expired_exceptions,
    in_sample,
    rules_for,
    utc_today,
)
from guard.program.program import ActionKind, ProgramRule

HERE = Location("p.yaml", 1, 1)
RED_TEAM = RequestMatch(labels={"tenant": frozenset({"red-team"})})
DAY = date(2027, 3, 31)


def rule(
    mode: Mode = Mode.ENFORCE,
    match: RequestMatch | None = None,
    exceptions: tuple[PolicyException, ...] = (),
    policy: str = "p",
) -> ProgramRule:
    return ProgramRule(
        policy=policy,
        rule="r",
        mode=mode,
        severity=Severity.MEDIUM,
        action=ActionKind.BLOCK,
        phase=Phase.ANY,
        on_error=OnError.OPEN,
        message="",
        condition_labels=(),
        thresholds=(),
        match=match or RequestMatch(),
        exceptions=exceptions,
    )


def exception(match: RequestMatch = RED_TEAM, until: date | None = None) -> PolicyException:
    return PolicyException("e", HERE, match, frozenset(), until)


def says(one: ProgramRule, facts: RequestFacts) -> tuple[bool, bool, bool]:
    """applies, enforced, exempt."""
    found = rules_for([one], facts)
    return bool(found.applies_R[0]), bool(found.enforced_R[0]), bool(found.exempt_R[0])


def test_a_rule_without_a_match_applies_to_every_request() -> None:
    assert says(rule(), RequestFacts()) == (True, True, False)
    assert says(rule(Mode.AUDIT), RequestFacts()) == (True, False, False)


@pytest.mark.parametrize(
    ("labels", "applies"),
    [
        ({}, False),
        ({"tenant": "red-team"}, True),
        ({"tenant": "red-team", "team": "x"}, True),
        ({"tenant": "Red-Team"}, False),
        ({"Tenant": "red-team"}, False),
    ],
    ids=["none", "it", "it and another", "another case of its value", "another case of its name"],
)
def test_a_rule_applies_to_requests_that_have_its_labels(labels: dict[str, str], applies: bool) -> None:
    facts = RequestFacts(labels=labels, enforced=frozenset({"p"}))
    assert says(rule(match=RED_TEAM), facts) == (applies, applies, False)


def test_every_label_is_asked_for_and_each_may_have_one_of_several_values() -> None:
    match = RequestMatch(labels={"a": frozenset({"1", "2"}), "b": frozenset({"3"})})
    assert says(rule(match=match), RequestFacts(labels={"a": "2", "b": "3"}))[0]
    assert not says(rule(match=match), RequestFacts(labels={"a": "2"}))[0]


def test_a_rule_applies_to_requests_of_its_adapters() -> None:
    match = RequestMatch(lora_adapters=frozenset({"tuned"}))
    assert says(rule(match=match), RequestFacts(lora_adapter="tuned"))[0]
    assert not says(rule(match=match), RequestFacts(lora_adapter="other"))[0]
    assert not says(rule(match=match), RequestFacts(lora_adapter=None))[0]


@pytest.mark.parametrize("mode", [Mode.AUDIT, Mode.ENFORCE])
def test_an_exempt_rule_applies_and_does_not_act(mode: Mode) -> None:
    facts = RequestFacts(labels={"tenant": "red-team"})
    assert says(rule(mode, exceptions=(exception(),)), facts) == (True, False, True)


@pytest.mark.parametrize("mode", [Mode.AUDIT, Mode.ENFORCE])
def test_a_request_that_names_the_policy_is_not_exempt(mode: Mode) -> None:
    facts = RequestFacts(labels={"tenant": "red-team"}, enforced=frozenset({"p"}))
    assert says(rule(mode, exceptions=(exception(),)), facts) == (True, True, False)
    other = rule(exceptions=(exception(),), policy="q")
    assert says(other, facts) == (True, False, True)


def test_the_last_day_of_an_exception_is_whole() -> None:
    labels = {"tenant": "red-team"}
    until = rule(exceptions=(exception(until=DAY),))
    assert says(until, RequestFacts(labels=labels, today=DAY))[2]
    assert not says(until, RequestFacts(labels=labels, today=date(2027, 4, 1)))[2]


def test_expired_exceptions_are_told_once_each() -> None:
    until = exception(until=DAY)
    rules = [rule(exceptions=(until, exception())), rule(exceptions=(until,))]
    assert expired_exceptions(rules, DAY) == []
    [said] = expired_exceptions(rules, date(2027, 4, 1))
    assert said.startswith("the exception p/e ended on 2027-03-31 and is not applied")


def test_one_of_several_exceptions_is_enough() -> None:
    expired, lasting = exception(until=date(2000, 1, 1)), exception()
    facts = RequestFacts(labels={"tenant": "red-team"}, today=DAY)
    assert says(rule(exceptions=(expired, lasting)), facts)[2]


def test_a_rule_that_does_not_apply_is_not_exempt_from_it() -> None:
    one = rule(match=RED_TEAM, exceptions=(exception(RequestMatch()),))
    assert says(one, RequestFacts()) == (False, False, False)


def test_today_is_a_day_in_utc() -> None:
    before = datetime.now(UTC).date()
    assert before <= utc_today() <= datetime.now(UTC).date()


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_sample_lies_within_a_larger_one(request_id: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert in_sample(request_id, large) or not in_sample(request_id, small)


@given(st.text(), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_sample_is_by_the_first_64_bits_of_sha_256(request_id: str, share: float) -> None:
    place = int(hashlib.sha256(request_id.encode()).hexdigest()[:16], 16)
    assert in_sample(request_id, share) == (place < share * 2**64)


def test_a_sample_has_about_its_share_of_requests() -> None:
    chosen = sum(in_sample(f"cmpl-{number}", 0.1) for number in range(10_000))
    assert 900 <= chosen <= 1100
    assert not any(in_sample(f"cmpl-{number}", 0.0) for number in range(100))
    assert all(in_sample(f"cmpl-{number}", 1.0) for number in range(100))


LABELS = st.dictionaries(st.sampled_from(["tenant", "team"]), st.sampled_from(["red-team", "a", "b"]))


@given(
    st.lists(
        st.builds(
            RequestFacts,
            request_id=st.sampled_from(["r1", "r2", "r3"]),
            labels=LABELS,
            lora_adapter=st.sampled_from([None, "one"]),
            today=st.dates(date(2026, 11, 1), date(2026, 11, 30)),
            enforced=st.sampled_from([frozenset(), frozenset({"p"})]),
        ),
        max_size=12,
    ),
    st.sampled_from([1.0, 0.5]),
)
def test_rules_that_were_worked_out_before_are_those_that_would_be_now(
    asked: list[RequestFacts], share: float
) -> None:
    rules = [
        rule(match=RequestMatch(labels={"tenant": frozenset({"red-team", "a"})}), mode=Mode.AUDIT),
        rule(match=RequestMatch(sample=share)),
        rule(match=RequestMatch(lora_adapters=frozenset({"one"}))),
        rule(exceptions=(exception(RED_TEAM, date(2026, 11, 15)),)),
    ]
    by_facts = RulesByFacts(rules)
    for facts in asked:
        found, expected = by_facts.of(facts), rules_for(rules, facts)
        for name in ("applies_R", "enforced_R", "exempt_R"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_of_many_kinds_of_requests_not_all_are_remembered() -> None:
    by_facts = RulesByFacts([rule()])
    for number in range(3 * MOST_KNOWN_FACTS):
        by_facts.of(RequestFacts("r", labels={"key": str(number)}))
    assert len(by_facts._known) <= MOST_KNOWN_FACTS
