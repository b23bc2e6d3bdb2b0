"""A policy with a rule that masks and one that blocks, and how a test runs a suite for it."""

from __future__ import annotations

from pathlib import Path

from guard.testing.run import Results, run_suites
from guard.testing.suite import find_suites

POLICY = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: burst, severity: high}
spec:
  mode: enforce
  experts:
    flagged:
      - {layer: 0, experts: [1, 2]}
      - {layer: 1, experts: [3]}
  rules:
    - name: burst
      match: {phase: output}
      when: {rate: {experts: flagged, over: 8, minTokens: 4, above: 0.12}}
      then: {mask: {experts: flagged, until: 6}}
    - name: stop
      when: {count: {experts: flagged, over: output, atLeast: 9}}
      then: {block: {message: No.}}
"""

HEADER = """\
apiVersion: moe-guard/v1
kind: PolicyTest
model: {layers: 2, experts: 8, topK: 2}
cases:
"""


def run(folder: Path, cases: str, policy: str = POLICY, header: str = HEADER) -> Results:
    """The results of a suite beside a policy; faults of finding it are faults of the results."""
    (folder / "policy.yaml").write_text(policy)
    (folder / "tests.yaml").write_text(header + cases)
    found = find_suites([folder])
    results = run_suites(found.suites, found.tested)
    return Results(results.suites, results.coverage, (*found.faults, *results.faults))


def messages(results: Results) -> list[str]:
    return [mismatch.message for case in results.cases for mismatch in case.mismatches]
