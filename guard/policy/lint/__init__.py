"""Lint: what in valid policies an operator would want to be told before it costs them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime

from guard.policy.lint.finding import Code, Finding, Level
from guard.policy.lint.masks import mask_findings
from guard.policy.lint.model_shape import ModelShape, shape_for
from guard.policy.lint.policies import policy_findings
from guard.policy.lint.rules import rule_findings
from guard.policy.lint.suites import tested
from guard.policy.lint.truth import Setting
from guard.policy.model import PolicySet

__all__ = ["Code", "Finding", "Level", "ModelShape", "lint", "tested"]


def lint(
    policies: PolicySet,
    *,
    shape: ModelShape | None = None,
    today: date | None = None,
    with_suite: Collection[str] | None = None,
) -> list[Finding]:
    """Everything that is found, in reading order.

    shape: of the model, where it is known; by default what each policy says of its model
    today: in UTC, by default now
    with_suite: names of the policies that have a test suite; by default those beside whose files one
        lies
    """
    day = today or datetime.now(UTC).date()
    suites = tested(policies.policies) if with_suite is None else with_suite
    findings = list(mask_findings(policies))
    for policy in policies.policies:
        findings += policy_findings(policy, day, tested=policy.name in suites)
        for rule in policy.rules:
            setting = Setting(rule.phase, shape or shape_for(policy))
            findings += rule_findings(policy, rule, setting)
    return sorted(dict.fromkeys(findings))
