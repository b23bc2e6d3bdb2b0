"""Runs suites: evaluates every case on the data plane's evaluator, and says what is not as expected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from guard.offline.evaluator import OfflineEvaluator, Outcome, result_of
from guard.policy.fault import Fault, Location
from guard.policy.model import Mode, PolicySet, Rule
from guard.testing.cases import Case, CaseBuilder
from guard.testing.expect import Happened, Mismatch
from guard.testing.suite import Suite


@dataclass(frozen=True)
class CaseResult:
    """fired: (rule, position) of each decision, by position."""

    suite: str
    name: str
    location: Location
    outcome: str
    fired: tuple[tuple[str, int], ...]
    mismatches: tuple[Mismatch, ...]

    @property
    def passed(self) -> bool:
        return not self.mismatches


class RuleCoverage(NamedTuple):
    """fires, silent: cases to which the rule applies and in which it fires, or does not."""

    rule: str
    location: Location
    fires: int
    silent: int
    can_be_silent: bool

    @property
    def missing(self) -> tuple[str, ...]:
        needed = [] if self.fires else ["a case in which it fires"]
        if self.can_be_silent and not self.silent:
            needed.append("a case in which it stays silent")
        return tuple(needed)


@dataclass(frozen=True)
class SuiteResult:
    suite: str
    cases: tuple[CaseResult, ...]
    seconds: float


@dataclass(frozen=True)
class Results:
    suites: tuple[SuiteResult, ...]
    coverage: tuple[RuleCoverage, ...]
    faults: tuple[Fault, ...]

    @property
    def cases(self) -> tuple[CaseResult, ...]:
        return tuple(case for suite in self.suites for case in suite.cases)

    @property
    def failed(self) -> tuple[CaseResult, ...]:
        return tuple(case for case in self.cases if not case.passed)

    @property
    def uncovered(self) -> tuple[RuleCoverage, ...]:
        return tuple(one for one in self.coverage if one.missing)


def run_suites(
    suites: Iterable[Suite], tested: Iterable[PolicySet] = (), wanted: str | None = None
) -> Results:
    """tested: policies whose rules count for coverage, besides those of the suites
    wanted: only cases whose suite and name have this in them
    """
    coverage = _Coverage()
    for policies in tested:
        coverage.add_policies(policies)
    results, faults = [], []
    for suite in suites:
        began = time.perf_counter()
        coverage.add_policies(suite.policies)
        builder = CaseBuilder(suite)
        cases = list(builder.build(wanted))
        faults += builder.faults
        if not builder.faults:
            done = tuple(_run(suite, builder, cases, coverage))
            if done or wanted is None:
                results.append(SuiteResult(suite.name, done, time.perf_counter() - began))
    return Results(tuple(results), coverage.of_rules(), tuple(sorted(set(faults))))


def _run(
    suite: Suite, builder: CaseBuilder, cases: Sequence[Case], coverage: _Coverage
) -> Iterable[CaseResult]:
    evaluator = OfflineEvaluator(suite.program)
    outcomes = list(evaluator.outcomes(case.request for case in cases))
    for case, outcome in zip(cases, outcomes, strict=True):
        routing = case.request.routing

        def values(position: int, case: Case = case) -> Sequence[float]:
            return [float(value) for value in evaluator.values_at(case.request, position)]

        happened = Happened(
            suite.program, builder.words.rules, outcome, routing.num_prompt_tokens, values
        )
        coverage.add_outcome(builder, outcome)
        yield CaseResult(
            suite.name,
            case.name,
            case.location,
            result_of(suite.program, outcome),
            tuple((f"{f.policy}/{f.rule}", f.position) for f in outcome.verdict.firings),
            tuple(case.expected.mismatches(happened)),
        )


class _Coverage:
    """Counts by rule, which is one wherever it was loaded from the same place."""

    def __init__(self) -> None:
        self._rules: dict[Location, tuple[str, Rule]] = {}
        self._fires: dict[Location, int] = {}
        self._silent: dict[Location, int] = {}

    def add_policies(self, policies: PolicySet) -> None:
        for policy in policies.policies:
            if policy.mode is not Mode.OFF:
                for rule in policy.rules:
                    self._rules[rule.location] = (f"{policy.name}/{rule.name}", rule)

    def add_outcome(self, builder: CaseBuilder, outcome: Outcome) -> None:
        fired = {(firing.policy, firing.rule) for firing in outcome.verdict.firings}
        for named in builder.words.rules:
            if outcome.rules.applies_R[named.number]:
                place = named.rule.location
                counted = self._fires if (named.policy.name, named.rule.name) in fired else self._silent
                counted[place] = counted.get(place, 0) + 1

    def of_rules(self) -> tuple[RuleCoverage, ...]:
        return tuple(
            RuleCoverage(
                name, place, self._fires.get(place, 0), self._silent.get(place, 0), not rule.is_static
            )
            for place, (name, rule) in sorted(self._rules.items())
        )
