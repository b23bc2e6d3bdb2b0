"""Cases at, just below and just above a rule's threshold."""

from __future__ import annotations

from typing import NamedTuple

from guard.policy.model import Condition
from guard.program.verdict import Routing
from guard.testing.experts import NamedRule, SuiteError
from guard.testing.tokens import TokenMaker


class ThresholdCase(NamedTuple):
    """fires: what must happen by the policy language's text alone."""

    name: str
    routing: Routing
    fires: bool


def threshold_cases(rule: NamedRule, condition: Condition, maker: TokenMaker) -> list[ThresholdCase]:
    """Raises SuiteError where they cannot be made exactly."""
    raise SuiteError("rule", f"{condition.kind} is not made yet")
