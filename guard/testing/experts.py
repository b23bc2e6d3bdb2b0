"""Which experts a suite's words mean: sets, what a rule reads, rules by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from guard.policy.model import Condition, ConditionKind, Expert, Mode, Policy, PolicySet, Rule
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.program.topology import Topology
from guard.testing.schema import UseSpec


class SuiteError(Exception):
    """What a suite asks for and cannot have. `key`: of the mapping that it is in, or ""."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key, self.text = key, text


class NamedRule(NamedTuple):
    number: int  # in deciding order
    policy: Policy
    rule: Rule

    @property
    def name(self) -> str:
        return f"{self.policy.name}/{self.rule.name}"


class Words:
    """The names of one policy set, and which experts of a model they mean.

    read, quiet: by row of a layer, the experts that a rule reads, and the others; probes do not count
    """

    def __init__(self, policies: PolicySet, topology: Topology) -> None:
        self._policies = policies
        self.rules = [
            NamedRule(number, policy, rule)
            for number, (policy, rule) in enumerate(policies.ordered_rules())
        ]
        read: set[Expert] = set()
        for _, _, rule in self.rules:
            for condition in rule.conditions():
                if condition.experts is not None and condition.kind is not ConditionKind.PROBE:
                    read.update(condition.experts.weights)
        self.read = [
            [id_ for id_ in range(layer.num_experts) if Expert(layer.number, id_) in read]
            for layer in topology.layers
        ]
        self.quiet = [
            sorted(set(range(layer.num_experts)) - set(ids))
            for layer, ids in zip(topology.layers, self.read, strict=True)
        ]

    def rule(self, reference: str, key: str = "rule") -> NamedRule:
        """Of `rule`, or `policy/rule`. Raises SuiteError."""
        policy_name, _, rule_name = reference.rpartition("/")
        found = [
            named
            for named in self.rules
            if named.rule.name == rule_name and policy_name in ("", named.policy.name)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = one_of(named.name for named in found)
            raise SuiteError(key, f"several policies have a rule {quote(rule_name)}; write {names}")
        for policy in self._policies.policies:
            is_meant = policy.mode is Mode.OFF and policy_name in ("", policy.name)
            if is_meant and any(rule.name == rule_name for rule in policy.rules):
                raise SuiteError(key, f"the policy {policy.name!r} is off: its rules never fire")
        choices = [named.rule.name for named in self.rules] + [named.name for named in self.rules]
        hint = (
            did_you_mean(reference, choices) or f"; the rules are {_some(choices[: len(self.rules)])}"
        )
        raise SuiteError(key, f"no policy of the suite has a rule {quote(reference)}{hint}")

    def policy(self, name: str, key: str) -> Policy:
        """Raises SuiteError."""
        for policy in self._policies.policies:
            if policy.name == name:
                return policy
        names = [policy.name for policy in self._policies.policies]
        hint = did_you_mean(name, names) or f"; the policies are {_some(names)}"
        raise SuiteError(key, f"no policy of the suite is called {quote(name)}{hint}")

    def condition(self, named: NamedRule, label: str | None) -> Condition:
        """The rule's condition of that label, or its only one. Raises SuiteError."""
        conditions = list(named.rule.conditions())
        labels = [condition.label for condition in conditions]
        if label is None:
            if len(conditions) == 1:
                return conditions[0]
            raise SuiteError(
                "rule", f"{named.name} has several conditions; add condition: {one_of(labels)}"
            )
        if label not in labels:
            hint = did_you_mean(label, labels) or f"; it has {_some(labels)}"
            raise SuiteError("condition", f"{named.name} has no condition {quote(label)}{hint}")
        return conditions[labels.index(label)]

    def experts(self, use: UseSpec) -> frozenset[Expert]:
        """Raises SuiteError."""
        if use.rule is not None:
            condition = self.condition(self.rule(use.rule), use.condition)
            if condition.experts is None or condition.kind is ConditionKind.PROBE:
                text = f"{condition.label} of {use.rule} reads all experts, and no set; name a set"
                raise SuiteError("rule", text)
            return frozenset(condition.experts.weights)
        assert use.set is not None, "the schema asks for one of the two"
        policies: Sequence[Policy] = self._policies.policies
        if use.policy is not None:
            policies = [self.policy(use.policy, "policy")]
        found = self._sets_named(use.set, policies)
        if len(found) > 1:
            text = (
                f"several policies have different sets {quote(use.set)}; "
                f"write use: {{set: {use.set}, policy: NAME}}"
            )
            raise SuiteError("set", text)
        if found:
            return found.pop()
        names = sorted({name for policy in policies for name in _set_names(policy)})
        known = [*names, "baseline", "quiet"]
        hint = did_you_mean(use.set, known) or f"; there is {_some(known)}"
        raise SuiteError("set", f"no policy or profile of the suite has a set {quote(use.set)}{hint}")

    def _sets_named(self, name: str, policies: Iterable[Policy]) -> set[frozenset[Expert]]:
        """A policy's own sets come before those of its profile."""
        own = {frozenset(policy.experts[name].weights) for policy in policies if name in policy.experts}
        return own or {
            frozenset(profile.sets[name].weights)
            for policy in policies
            for profile in policy.profiles
            if name in profile.sets
        }


def _set_names(policy: Policy) -> set[str]:
    return {*policy.experts, *(name for profile in policy.profiles for name in profile.sets)}


def _some(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(names))
    return one_of(shown[:8], "and") + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
