"""The policies under attack. Each holds for one `tenant` alone, so that one server is every victim.

Every token of the tiny model chooses 2 experts in each of 2 layers: 4 selections, whatever it says.
So a count is a number of tokens, and no attack gets away by what a model of random weights happens to
route.
"""

from __future__ import annotations

MESSAGE = "This request was stopped by policy."
LIMIT_TOKENS = 40
"""Tokens of a request, or of a prompt, at which the tenants `request` and `prompt` are blocked."""

POLICIES = f"""\
apiVersion: moe-guard/v1
kind: ExpertSets
metadata: {{name: experts-of-tiny}}
spec:
  experts:
    every: [{{layers: 0-1, experts: [0-7]}}]
    some: [{{layers: 0-1, experts: [0-4]}}]
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: stop-output, severity: critical}}
spec:
  mode: enforce
  rules:
    - name: third
      match: {{labels: {{tenant: output}}}}
      when: {{count: {{experts: all/every, over: output, atLeast: 12}}}}
      then: {{block: {{message: {MESSAGE}}}}}
  exceptions:
    - {{name: red-team, match: {{labels: {{team: red}}}}}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: stop-request, severity: high}}
spec:
  mode: enforce
  rules:
    - name: fortieth
      match: {{labels: {{tenant: request}}}}
      when: {{count: {{experts: all/every, over: request, atLeast: {4 * LIMIT_TOKENS}}}}}
      then: {{block: {{message: {MESSAGE}}}}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: stop-prompt, severity: high}}
spec:
  mode: enforce
  rules:
    - name: long
      match: {{phase: prompt, labels: {{tenant: prompt}}}}
      when: {{count: {{experts: all/every, over: prompt, atLeast: {4 * LIMIT_TOKENS}}}}}
      then: {{block: {{message: {MESSAGE}}}}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: reroute}}
spec:
  mode: enforce
  rules:
    - name: always
      match: {{labels: {{tenant: masked}}}}
      when: always
      then: {{mask: {{experts: all/some}}}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: audited, severity: low}}
spec:
  mode: audit
  rules:
    - name: third
      when: {{count: {{experts: all/every, over: output, atLeast: 12}}}}
      then: {{block: {{message: {MESSAGE}}}}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: sampled, severity: info}}
spec:
  mode: enforce
  rules:
    - name: half
      match: {{phase: prompt, sample: 0.5, labels: {{tenant: sampled}}}}
      when: {{count: {{experts: all/every, over: prompt, atLeast: 1}}}}
      then: {{block: {{message: {MESSAGE}}}}}
"""
