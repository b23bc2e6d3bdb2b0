"""Strategies for what is known of a request, and for the matches and exceptions that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from hypothesis import strategies as st

from guard.policy.model import PolicyException, RequestMatch
from guard.program.applicability import RequestFacts
from tests.conformance.condition_strategies import LOCATION
from tests.conformance.drawing import digits, pick, subset

TODAY = date(2027, 3, 31)


def match(draw: st.DrawFn) -> RequestMatch:
    adapters, tenants, samples = digits(draw, [3, 3, 3])
    return RequestMatch(
        lora_adapters=(None, None, frozenset({"tuned"}))[adapters],
        labels=({}, {"tenant": frozenset({"a"})}, {"tenant": frozenset({"a", "b"})})[tenants],
        sample=(1.0, 1.0, 0.5)[samples],
    )


def exceptions(draw: st.DrawFn, rules: Sequence[str]) -> tuple[PolicyException, ...]:
    """None, one or two, some for all rules, some of them expired."""
    return tuple(
        PolicyException(
            f"exception-{n}",
            LOCATION,
            match(draw),
            frozenset(subset(draw, rules) if draw(st.booleans()) else ()),
            pick(draw, [None, TODAY, TODAY - timedelta(days=1)]),
        )
        for n in range(pick(draw, [0, 0, 1, 2]))
    )


def facts(draw: st.DrawFn, audits: Sequence[str]) -> RequestFacts:
    """audits: policies in audit, of which the request enforces some."""
    tenants, adapters, number = digits(draw, [3, 2, 8])
    return RequestFacts(
        request_id=f"cmpl-{number}",
        labels=({}, {"tenant": "a"}, {"tenant": "b"})[tenants],
        lora_adapter=(None, "tuned")[adapters],
        today=TODAY,
        enforced=frozenset(name for name in audits if draw(st.booleans())),
    )
