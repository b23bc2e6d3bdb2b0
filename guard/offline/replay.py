"""Policies over recorded routing: what would have fired, and how that changes with a threshold."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple

import numpy as np

from guard.offline.evaluator import OfflineEvaluator, OfflineRequest, Outcome
from guard.policy.model import (
    All,
    AnyOf,
    Condition,
    ConditionKind,
    Expression,
    Mode,
    Not,
    Observe,
    Policy,
    PolicySet,
    Rule,
)
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.topology import Topology
from guard.trace.format import TracedRequest

EXACT_POSITIONS: Final = 4096
PARTS: Final = 64
"""First positions are counted one by one up to the former, and behind it in steps of 1/64."""


class Replayed(NamedTuple):
    """request: without its arrays, so that what waits for an earlier one takes no memory"""

    request: TracedRequest
    outcome: Outcome


def replay(
    evaluator: OfflineEvaluator, requests: Iterable[TracedRequest], enforce: Collection[str] = ()
) -> Iterator[Replayed]:
    """Each request with what would have been decided about it, in order; routing is taken as given.

    enforce: policies in audit that are enforced for every request
    """
    under_way: deque[TracedRequest] = deque()

    def offline() -> Iterator[OfflineRequest]:
        for request in requests:
            under_way.append(_without_arrays(request))
            yield OfflineRequest(request.routing, facts_of(request, enforce))

    for outcome in evaluator.outcomes(offline()):
        yield Replayed(under_way.popleft(), outcome)


def facts_of(request: TracedRequest, enforce: Collection[str] = ()) -> RequestFacts:
    """As they were when it was recorded: exceptions are judged by that day."""
    return RequestFacts(
        request_id=request.request_id,
        labels=request.labels,
        lora_adapter=request.lora_adapter,
        today=datetime.fromtimestamp(request.time, UTC).date(),
        enforced=frozenset(enforce),
    )


def _without_arrays(request: TracedRequest) -> TracedRequest:
    routing = request.routing
    ids, weights = np.zeros_like(routing.topk_ids[:0]), np.zeros_like(routing.topk_weights[:0])
    routing = routing._replace(topk_ids=ids, topk_weights=weights)
    return replace(request, routing=routing, token_ids=None)


def without_mass(policies: PolicySet) -> tuple[PolicySet, list[str]]:
    """For a trace without gate weights: the policies without rules that read them, and their names."""
    kept, left_out = [], []
    for policy in policies.policies:
        rules = []
        for rule in policy.rules:
            if any(condition.kind is ConditionKind.MASS for condition in rule.conditions()):
                left_out.append(f"{policy.name}/{rule.name}")
            else:
                rules.append(rule)
        kept.append(replace(policy, rules=tuple(rules)))
    return PolicySet(tuple(kept), policies.revision), left_out


class Quantiles:
    """Of whole numbers, in memory that does not grow with how many there are; within 1/64 of them."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        self.total = 0

    def add(self, number: int) -> None:
        self._count[_rounded(number)] += 1
        self.total += 1

    def at(self, share: float) -> int | None:
        """The least number that so large a share is not above."""
        below = 0
        for number in sorted(self._count):
            below += self._count[number]
            if below >= share * self.total:
                return number
        return None


def _rounded(number: int) -> int:
    if number < EXACT_POSITIONS:
        return number
    step = (1 << (number.bit_length() - 1)) // PARTS
    return number // step * step


@dataclass
class RuleCount:
    """requests: to which the rule applies; fired: in which it fires; decisions: how often in all"""

    requests: int = 0
    fired: int = 0
    decisions: int = 0
    exempt: int = 0
    first_positions: Quantiles = field(default_factory=Quantiles)


class Summary:
    """Counts over a replay, by rule and by outcome."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.requests = 0
        self.tokens = 0
        self.unseen = 0
        self.outcomes: Counter[str] = Counter()
        self.rules = {(rule.policy, rule.rule): RuleCount() for rule in program.rules}

    def add(self, outcome: Outcome, result: str) -> None:
        self.requests += 1
        self.tokens += outcome.tokens
        self.unseen += outcome.unseen
        self.outcomes[result] += 1
        for rule, applies in zip(self.program.rules, outcome.rules.applies_R, strict=True):
            self.rules[rule.policy, rule.rule].requests += int(applies)
        seen: set[tuple[str, str]] = set()
        for firing in outcome.verdict.firings:
            name = firing.policy, firing.rule
            count = self.rules[name]
            count.decisions += 1
            count.exempt += firing.exempt
            if name not in seen:
                seen.add(name)
                count.fired += 1
                count.first_positions.add(firing.position)


class SweepPoint(NamedTuple):
    threshold: float
    fired: int
    requests: int
    is_current: bool


class Sweep:
    """One rule with other thresholds in one of its conditions, each an observing rule of its own: its
    persistence, its other conditions and its match are as they are."""

    def __init__(
        self, policies: PolicySet, topology: Topology, policy: str, rule: str, label: str
    ) -> None:
        owner = next(one for one in policies.policies if one.name == policy)
        self._rule = next(one for one in owner.rules if one.name == rule)
        self._owner = owner
        self._topology = topology
        self.condition = next(one for one in self._rule.conditions() if one.label == label)
        self.name = f"{policy}/{rule}/{label}"

    def thresholds(self, extremes: Iterable[float], number: int = 10) -> list[float]:
        """Quantiles of the requests' most extreme values, and the threshold that the rule has."""
        ordered = sorted(extremes)
        chosen = {self.condition.threshold}
        for n in range(number + 1) if ordered else ():
            chosen.add(float(f"{ordered[n * (len(ordered) - 1) // number]:.4g}"))
        return sorted(chosen)

    def run(self, thresholds: Iterable[float], requests: Iterable[TracedRequest]) -> list[SweepPoint]:
        wanted = list(dict.fromkeys(thresholds))
        variants = [self._variant(number, value) for number, value in enumerate(wanted)]
        program = compile_policies(PolicySet(tuple(variants), revision="sweep"), self._topology)
        fired: Counter[str] = Counter()
        total = 0
        for replayed in replay(OfflineEvaluator(program), requests):
            total += 1
            fired.update({firing.policy for firing in replayed.outcome.verdict.firings})
        current = self.condition.threshold
        return [
            SweepPoint(value, fired[variant.name], total, value == current)
            for value, variant in zip(wanted, variants, strict=True)
        ]

    def _variant(self, number: int, threshold: float) -> Policy:
        when = _with_threshold(self._rule.when, self.condition.label, threshold)
        rule: Rule = replace(self._rule, when=when, then=Observe())
        return replace(
            self._owner,
            name=f"sweep-{number:06d}",
            mode=Mode.AUDIT,
            rules=(rule,),
            exceptions=(),
            experts={},
        )


def _with_threshold(node: Expression, label: str, threshold: float) -> Expression:
    match node:
        case Condition():
            return replace(node, threshold=threshold) if node.label == label else node
        case Not(child):
            return Not(_with_threshold(child, label, threshold))
        case All(children):
            return All(tuple(_with_threshold(child, label, threshold) for child in children))
        case AnyOf(children):
            return AnyOf(tuple(_with_threshold(child, label, threshold) for child in children))
