"""The cases that the command makes lie exactly at a threshold, and just on each side of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.policy import load_policies
from guard.program.reference import evaluate
from guard.testing.cases import CaseBuilder
from guard.testing.suite import find_suites
from tests.unit.testing.suites import messages, run

POLICY = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: p}}
spec:
  profile: profile.json
  experts:
    flagged:
      - {{layer: 0, experts: [1, 2]}}
      - {{layer: 1, experts: [3]}}
    weighted:
      - {{layer: 0, weights: {{1: 0.5, 2: -0.25}}}}
  rules:
    - name: r
      match: {{phase: {phase}}}
      when: {when}
      persist: {persist}
"""
PROFILE = """\
{"apiVersion": "moe-guard/v1", "kind": "Profile",
 "model": {"architecture": "TestMoe", "layers": 2, "experts": 8, "topK": 2},
 "baselines": {"tokens": 1000, "rates": {
   "0": [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.496, 0.004],
   "1": [0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]}},
 "probes": {"q": {"bias": -1.5, "weights": [{"layer": 1, "weights": {"3": 2.0, "4": -1.0}}]},
  "all": {"bias": 0.07, "weights": [{"layer": 0, "weights":
    {"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.4, "4": -0.1, "5": -0.2, "6": -0.3, "7": -0.4}}]}}}
"""
SUITE = """\
apiVersion: moe-guard/v1
kind: PolicyTest
cases:
  - name: edge
    threshold: r
"""
ALL_THREE = ["just below", "at", "just above"]
SIDES = ["just below", "just above"]

RULES = {
    "rate above": ("output", "{rate: {experts: flagged, over: 8, above: 0.125}}", 1, ALL_THREE, "+"),
    "rate atLeast": ("any", "{rate: {experts: flagged, over: 8, atLeast: 0.125}}", 1, ALL_THREE, "=+"),
    "rate below": ("prompt", "{rate: {experts: flagged, over: 8, below: 0.125}}", 1, ALL_THREE, "-"),
    "rate between two numbers": (
        "output",
        "{rate: {experts: flagged, over: 8, above: 0.12}}",
        1,
        SIDES,
        "+",
    ),
    "rate with a low floor": (
        "output",
        "{rate: {experts: flagged, over: 8, minTokens: 2, above: 0.125}}",
        1,
        ALL_THREE,
        "+",
    ),
    "rate over the request": (
        "output",
        "{rate: {experts: flagged, minTokens: 4, above: 0.12}}",
        1,
        ALL_THREE,
        "+",
    ),
    "count atLeast": ("output", "{count: {experts: flagged, over: 8, atLeast: 3}}", 1, ALL_THREE, "=+"),
    "count of a token": (
        "any",
        "{count: {experts: flagged, over: token, above: 1}}",
        1,
        ALL_THREE,
        "+",
    ),
    "count atMost": ("output", "{count: {experts: flagged, over: 8, atMost: 3}}", 1, ALL_THREE, "-="),
    "count over the prompt": (
        "any",
        "{count: {experts: flagged, over: prompt, atLeast: 2}}",
        1,
        ALL_THREE,
        "=+",
    ),
    "count negated": (
        "output",
        "{not: {count: {experts: flagged, over: 8, minTokens: 8, atMost: 3}}}",
        1,
        ALL_THREE,
        "+",
    ),
    "mass above": ("any", "{mass: {experts: flagged, over: request, above: 0.3}}", 1, ALL_THREE, "+"),
    "mass of four digits": (
        "output",
        "{mass: {experts: flagged, over: 4, atLeast: 0.1234}}",
        1,
        ALL_THREE,
        "=+",
    ),
    "mass atMost": ("output", "{mass: {experts: flagged, over: 4, atMost: 0.25}}", 1, ALL_THREE, "-="),
    "score": (
        "output",
        "{score: {experts: weighted, over: 4, bias: 0.1, above: 0.35}}",
        1,
        ALL_THREE,
        "+",
    ),
    "score below zero": (
        "output",
        "{score: {experts: weighted, over: 4, below: -0.125}}",
        1,
        ALL_THREE,
        "-",
    ),
    "coactivation of members": (
        "any",
        "{coactivation: {experts: flagged, members: 2, over: 6, atLeast: 2}}",
        1,
        ALL_THREE,
        "=+",
    ),
    "coactivation of layers": (
        "output",
        "{coactivation: {experts: flagged, layers: 2, over: 6, above: 2}}",
        1,
        ALL_THREE,
        "+",
    ),
    "dormant": ("output", "{dormant: {baselineBelow: 0.01, over: 8, above: 1}}", 1, ALL_THREE, "+"),
    "suppressed": ("output", "{suppressed: {experts: flagged, over: 16, above: 1.0}}", 1, SIDES, "+"),
    "probe": ("output", "{probe: {name: q, over: 4, atLeast: 0.5}}", 1, ALL_THREE, "=+"),
    "probe that weighs every expert": (
        "prompt",
        "{probe: {name: all, over: prompt, minTokens: 3, above: 0.5}}",
        1,
        SIDES,
        "+",
    ),
    "rate that persists": (
        "output",
        "{rate: {experts: flagged, over: 8, above: 0.125}}",
        3,
        ALL_THREE,
        "+",
    ),
    "count of a token that persists": (
        "any",
        "{count: {experts: flagged, over: token, atLeast: 2}}",
        2,
        ALL_THREE,
        "=+",
    ),
}
SIGNS = {"-": "just below", "=": "at", "+": "just above"}


@pytest.mark.parametrize(("phase", "when", "hits", "names", "firing"), RULES.values(), ids=list(RULES))
def test_cases_lie_around_the_threshold_and_the_slow_reference_agrees(
    tmp_path: Path, phase: str, when: str, hits: int, names: list[str], firing: str
) -> None:
    (tmp_path / "profile.json").write_text(PROFILE)
    persist = f"{{hits: {hits}, of: {hits + 1}}}"
    policy = POLICY.format(phase=phase, when=when, persist=persist)
    results = run(tmp_path, SUITE.partition("cases:\n")[2], policy, SUITE.partition("  - name")[0])
    assert results.faults == ()
    assert [case.name for case in results.cases] == [f"edge [{name}]" for name in names]
    assert messages(results) == []
    fired = {case.name for case in results.cases if case.fired}
    assert fired == {f"edge [{SIGNS[sign]}]" for sign in firing} & {f"edge [{n}]" for n in names}

    (suite,) = find_suites([tmp_path]).suites
    policies = load_policies(tmp_path)
    for case in CaseBuilder(suite).build():
        verdict = evaluate(policies, suite.topology, case.request.routing)
        assert bool(verdict.firings) == (case.name in fired)


REFUSED = {
    "always": ("any", "always", "it has no threshold"),
    "entropy": ("output", "{entropy: {over: 8, above: 3}}", "reads how all experts are used"),
    "several conditions": (
        "output",
        "{all: [{count: {experts: flagged, above: 1}}, {rate: {experts: flagged, above: 0.1}}]}",
        "has several conditions; add condition: count or rate",
    ),
    "a threshold that is out of reach": (
        "output",
        "{rate: {experts: flagged, over: 8, above: 1.0}}",
        "no number of selections lies on each side of 1",
    ),
}


@pytest.mark.parametrize(("phase", "when", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_made_exactly_is_refused_with_a_reason(
    tmp_path: Path, phase: str, when: str, message: str
) -> None:
    (tmp_path / "profile.json").write_text(PROFILE)
    policy = POLICY.format(phase=phase, when=when, persist="{hits: 1, of: 1}")
    results = run(tmp_path, SUITE.partition("cases:\n")[2], policy, SUITE.partition("  - name")[0])
    assert [message in str(fault) for fault in results.faults] == [True], results.faults
    assert str(results.faults[0]).startswith(f"{tmp_path}/tests.yaml:5:")
