"""Replay decides as the slow reference does, and a sweep as if each threshold had been written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from guard.offline.evaluator import OfflineEvaluator, result_of
from guard.offline.replay import Quantiles, Summary, Sweep, facts_of, replay, without_mass
from guard.offline.sample import Sample
from guard.policy.load import parse_policies
from guard.policy.model import PolicySet
from guard.program.compile import compile_policies
from guard.program.reference import evaluate
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest

TOPOLOGY = Topology("TestMoe", (MoELayer(0, 8, 2), MoELayer(1, 8, 2)))
POLICIES = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: p}
spec:
  mode: {mode}
  experts:
    flagged: [{layers: 0-1, experts: [1, 2]}]
  rules:
    - name: burst
      match: {phase: output}
      when:
        all:
          - rate: {experts: flagged, over: 6, above: 0.3}
          - count: {experts: flagged, over: request, atLeast: 4}
      persist: {hits: 2, of: 3}
      then: {mask: {experts: flagged, until: 3}}
    - name: heavy
      when: {mass: {experts: flagged, over: request, minTokens: 8, above: 0.35}}
      then: {block: {message: No.}}
"""


def policies(mode: str = "audit") -> PolicySet:
    return parse_policies(POLICIES.replace("{mode}", mode))


def traced(number: int) -> TracedRequest:
    random = np.random.default_rng(number)
    positions = int(random.integers(4, 32))
    shape = (positions, 2, 8)
    ids = np.argsort(random.random(shape), axis=2)[:, :, :2].astype(np.int32)
    weights = random.random((positions, 2, 2), dtype=np.float32)
    prompt = int(random.integers(1, positions))
    routing = Routing(ids, weights, prompt, first_seen=int(random.integers(0, 2)))
    return TracedRequest(routing, f"cmpl-{number}", 1_700_000_000.0 + number)


REQUESTS = [traced(number) for number in range(24)]


def test_each_request_is_decided_as_by_the_reference() -> None:
    for mode in ("audit", "enforce"):
        program = compile_policies(policies(mode), TOPOLOGY)
        summary = Summary(program)
        verdicts = []
        for one, request in zip(replay(OfflineEvaluator(program), REQUESTS), REQUESTS, strict=True):
            verdict = evaluate(policies(mode), TOPOLOGY, request.routing, facts=facts_of(request))
            found = [(f.position, f.rule) for f in one.outcome.verdict.firings]
            assert found == [(f.position, f.rule) for f in verdict.firings]
            assert one.outcome.verdict[1:] == verdict[1:]
            assert one.request.request_id == request.request_id
            assert len(one.request.routing.topk_ids) == 0, "its arrays are still held"
            summary.add(one.outcome, result_of(program, one.outcome))
            verdicts.append(verdict)
        burst = summary.rules["p", "burst"]
        of_burst = [[f for f in v.firings if f.rule == "burst"] for v in verdicts]
        assert 0 < burst.fired == sum(map(bool, of_burst)) < burst.requests == len(REQUESTS)
        assert burst.decisions == sum(map(len, of_burst))
        firsts = sorted(found[0].position for found in of_burst if found)
        assert burst.first_positions.at(0.5) == firsts[(len(firsts) - 1) // 2]
        assert summary.outcomes.total() == len(REQUESTS)
        blocked = sum(verdict.blocked is not None for verdict in verdicts)
        assert summary.outcomes["blocked"] == blocked


def test_a_policy_in_audit_can_be_enforced_for_the_replay() -> None:
    program = compile_policies(policies(), TOPOLOGY)
    outcomes = [one.outcome for one in replay(OfflineEvaluator(program), REQUESTS, ["p"])]
    enforced = compile_policies(policies("enforce"), TOPOLOGY)
    expected = [one.outcome for one in replay(OfflineEvaluator(enforced), REQUESTS)]
    assert [one.verdict for one in outcomes] == [one.verdict for one in expected]
    assert any(one.verdict.blocked for one in outcomes)


def test_a_sweep_is_what_each_threshold_would_have_given_with_persistence_and_the_rest() -> None:
    sweep = Sweep(policies(), TOPOLOGY, "p", "burst", "rate")
    thresholds = [0.1, 0.3, 0.35, 0.5]
    points = sweep.run(thresholds, REQUESTS)
    assert [(point.threshold, point.is_current) for point in points] == [
        (0.1, False),
        (0.3, True),
        (0.35, False),
        (0.5, False),
    ]
    for point in points:
        text = POLICIES.replace("above: 0.3}", f"above: {point.threshold}}}").replace("{mode}", "audit")
        fired = 0
        for request in REQUESTS:
            verdict = evaluate(parse_policies(text), TOPOLOGY, request.routing)
            fired += any(firing.rule == "burst" for firing in verdict.firings)
        assert (point.fired, point.requests) == (fired, len(REQUESTS))
    assert [point.fired for point in points] == sorted((p.fired for p in points), reverse=True)
    assert len({point.fired for point in points}) > 2


def test_thresholds_are_chosen_among_what_requests_reach() -> None:
    sweep = Sweep(policies(), TOPOLOGY, "p", "burst", "rate")
    assert sweep.thresholds([]) == [0.3]
    chosen = sweep.thresholds([0.0, 0.123456, 0.5, 1.0], number=3)
    assert chosen == [0.0, 0.1235, 0.3, 0.5, 1.0]


def test_without_gate_weights_rules_that_read_them_are_left_out() -> None:
    kept, left_out = without_mass(policies())
    assert left_out == ["p/heavy"]
    assert [rule.name for rule in kept.policies[0].rules] == ["burst"]


def test_quantiles_are_exact_near_zero_and_near_beyond() -> None:
    numbers = Quantiles()
    assert numbers.at(0.5) is None
    for number in [5, 1, 3, 1_000_000]:
        numbers.add(number)
    assert (numbers.at(0.1), numbers.at(0.5), numbers.at(0.75)) == (1, 3, 5)
    last = numbers.at(1.0)
    assert last is not None
    assert 1_000_000 * (1 - 1 / 64) <= last <= 1_000_000


def test_a_sample_is_bounded_and_the_same_each_time() -> None:
    one, other = Sample(10), Sample(10)
    for number in range(1000):
        one.add(number)
        other.add(number)
    assert one.kept == other.kept
    assert len(set(one.kept)) == 10
    assert max(one.kept) > 100


def test_many_requests_of_all_lengths_come_out_in_order() -> None:
    program = compile_policies(policies("enforce"), TOPOLOGY)
    many = [replace(REQUESTS[n % 24], request_id=str(n)) for n in range(600)]
    found = [one.request.request_id for one in replay(OfflineEvaluator(program, max_rows=256), many)]
    assert found == [str(n) for n in range(600)]
