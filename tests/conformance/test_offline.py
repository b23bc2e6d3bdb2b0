"""Evaluation of routing that is known already says what the slow reference says."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.offline.evaluator import OfflineEvaluator, OfflineRequest
from guard.program.compile import compile_policies
from guard.program.reference import evaluate
from guard.program.verdict import Firing, Verdict
from tests.conformance.strategies import Case, cases, routings

OFF_THE_EDGE = 1.3e-8
"""Added before rounding: values of two evaluators that differ in the last bit round alike."""


def comparable(verdict: Verdict) -> tuple[object, ...]:
    return [_rounded(firing) for firing in verdict.firings], verdict.masks, verdict.blocked


def _rounded(firing: Firing) -> tuple[object, ...]:
    evidence = [
        (e.condition, None if np.isnan(e.value) else round(e.value + OFF_THE_EDGE, 7), e.threshold)
        for e in firing.evidence
    ]
    return firing.position, firing.policy, firing.rule, evidence, firing.exempt


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from([5, 64]), st.data())
def test_verdicts_equal_the_references_many_requests_at_once(
    case: Case, max_rows: int, data: st.DataObject
) -> None:
    others = [data.draw(routings(case.topology)) for _ in range(2)]
    facts = case.facts
    unseen = frozenset(data.draw(st.sets(st.integers(0, len(case.routing.topk_ids) - 1), max_size=3)))
    requests = [
        OfflineRequest(case.routing, facts),
        *[OfflineRequest(other) for other in others],
        OfflineRequest(case.routing._replace(unseen=unseen), facts),
        OfflineRequest(case.routing),
    ]
    evaluator = OfflineEvaluator(compile_policies(case.policies, case.topology), max_rows=max_rows)
    outcomes = list(evaluator.outcomes(requests))
    assert len(outcomes) == len(requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        expected = evaluate(case.policies, case.topology, request.routing, facts=request.facts)
        assert comparable(outcome.verdict) == comparable(expected)
