"""A program that replaces another on the way: rules that stay decide as if nothing had happened, rules
that are new as if the request had begun unseen, and masks of rules that are gone end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from guard.device.layout import Capacity
from guard.policy.model import Block, Mask, Mode, Observe, Policy, PolicySet, Rule
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.reference import evaluate
from guard.program.topology import Topology
from guard.runtime import Guard
from tests.conformance.drive import (
    MAX_ROWS,
    Driven,
    device_outcome,
    prompt_chunks,
    reference_outcome,
    step,
)
from tests.conformance.strategies import Case, cases, policy_sets, routings

Name = tuple[str, str]
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


def _without_blocks(policies: tuple[Policy, ...]) -> list[Policy]:
    """A block ends what is compared; blocks have tests of their own."""

    def mild(rule: Rule) -> Rule:
        return replace(rule, then=Observe()) if isinstance(rule.then, Block) else rule

    return [replace(policy, rules=tuple(map(mild, policy.rules))) for policy in policies]


@st.composite
def successors(draw: st.DrawFn, before: PolicySet, topology: Topology) -> PolicySet:
    """Policies of a set as they are, less some rules, in audit now or gone; and new ones."""
    after = []
    for policy in before.policies:
        match draw(st.sampled_from(["stays", "stays", "loses a rule", "audit", "goes"])):
            case "stays":
                after.append(policy)
            case "loses a rule":
                gone = draw(st.integers(0, len(policy.rules) - 1))
                after.append(
                    replace(policy, rules=tuple(r for n, r in enumerate(policy.rules) if n != gone))
                )
            case "audit" if policy.mode is Mode.ENFORCE:
                after.append(replace(policy, mode=Mode.AUDIT))
    more = draw(policy_sets(topology))
    after += [replace(p, name=f"new-{p.name}") for p in _without_blocks(more.policies)]
    after.sort(key=lambda policy: (-policy.severity.rank, policy.name))
    return PolicySet(tuple(after), "after")


def _alone(policy: Policy, rule: Rule) -> PolicySet:
    return PolicySet((replace(policy, rules=(rule,)),), "alone")


class Expected:
    """What the reference says of one request, rule by rule: without blocks no rule changes another."""

    def __init__(self, topology: Topology, request: Driven, reloaded_at: int) -> None:
        self._topology = topology
        self._request = request
        self._at = reloaded_at
        self.firings: Counter[object] = Counter()
        self.masked: dict[Name, set[int]] = {}

    def add(self, policy: Policy, rule: Rule, since: int, until: int, masked_until: int) -> None:
        """Evaluated from `since` on; counts at positions below `until`, masks below `masked_until`."""
        routing = self._request.routing
        routing = routing._replace(first_seen=max(routing.first_seen, since))
        if routing.first_seen >= len(routing.topk_ids):
            return
        facts = self._request.facts or RequestFacts()
        verdict = evaluate(_alone(policy, rule), self._topology, routing, facts=facts)
        outcome = reference_outcome(verdict, routing)
        self.firings.update(f for f in outcome.firings if f[0] < until)
        masked = outcome.masked_positions.get((policy.name, rule.name), set())
        then = rule.then
        if since and rule.is_static and isinstance(then, Mask) and isinstance(then.until, int):
            masked = self._static_from(policy, replace(rule, then=replace(then, until="request-end")))
            masked = set(sorted(p for p in masked if p >= since)[: then.until])
        self.masked.setdefault((policy.name, rule.name), set()).update(
            p for p in masked if since <= p < masked_until
        )

    def _static_from(self, policy: Policy, rule: Rule) -> set[int]:
        """A mask for some tokens begins with the first behind the reload that one without end has."""
        routing, facts = self._request.routing, self._request.facts or RequestFacts()
        verdict = evaluate(_alone(policy, rule), self._topology, routing, facts=facts)
        found = reference_outcome(verdict, routing).masked_positions
        return found.get((policy.name, rule.name), set())


def _is_all_new(program: Program, number: int) -> bool:
    """All that the rule counts is counted since this program came."""
    table, epochs = program.rule_table, program.signals.token_epochs
    measured = [label for label in program.rules[number].condition_labels if label != "always"]
    if not measured:
        return True
    return bool(epochs[table.oldest_tokens[number]] == program.generation)


@settings(max_examples=60, deadline=None, phases=NO_SHRINKING, suppress_health_check=list(HealthCheck))
@given(cases(), st.lists(st.integers(1, 12), min_size=12, max_size=12), st.data())
def test_rules_that_stay_go_on_and_new_ones_begin(
    case: Case, sizes: list[int], data: st.DataObject
) -> None:
    before = PolicySet(tuple(_without_blocks(case.policies.policies)), "before")
    after = data.draw(successors(before, case.topology))
    other = data.draw(routings(case.topology))
    requests = [
        Driven("a", case.routing, prompt_chunks(case.routing, iter(sizes)), case.facts),
        Driven("b", other, prompt_chunks(other, iter(reversed(sizes))), RequestFacts("b")),
    ]
    first = compile_policies(before, case.topology)
    second = compile_policies(after, case.topology, first)
    words = max(first.masks.num_words, second.masks.num_words)
    guard = Guard(first, Capacity(MAX_ROWS, 8, words), torch.device("cpu"))
    for request in requests:
        request.position = request.routing.first_seen
        guard.add_request(request.req_id, request.routing.num_prompt_tokens, request.facts)

    steps_before = data.draw(st.integers(0, 8))
    reloaded_at: dict[str, int] = {}
    ordered = list(before.ordered_rules())
    while (batch := [r for r in requests if r.position < r.num_positions]) or not reloaded_at:
        if steps_before == 0 or not batch:
            reloaded_at = {request.req_id: request.position for request in requests}
            guard.install(guard.prepare(second), reloaded_at)
            ordered = list(after.ordered_rules())
        if batch:
            step(guard, batch, ordered)
        steps_before -= 1

    old = {(p.name, r.name): (p, r) for p, r in before.ordered_rules()}
    for request in requests:
        at, end = reloaded_at[request.req_id], request.num_positions
        expected = Expected(case.topology, request, at)
        skipped: set[Name] = set()
        stays: set[Name] = set()
        for number, (policy, rule) in enumerate(after.ordered_rules()):
            name = (policy.name, rule.name)
            if name in old and first.rules:
                stays.add(name)
                was, _ = old[name]
                is_released = was.mode is Mode.ENFORCE and policy.mode is Mode.AUDIT
                expected.add(was, rule, 0, end, at if is_released else end)
            elif _is_all_new(second, number):
                expected.add(policy, rule, at, end, end)
            else:
                skipped.add(name)
        for name in old.keys() - stays:
            expected.add(*old[name], 0, at, at)
        found = device_outcome(request, [])
        seen = Counter(f for f in found.firings if f[1:3] not in skipped)
        assert seen == expected.firings
        masked = {name: at for name, at in found.masked_positions.items() if name not in skipped}
        assert masked == {name: at for name, at in expected.masked.items() if at}
