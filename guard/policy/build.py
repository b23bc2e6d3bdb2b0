"""A validated document -> the `Policy` that it means, with every default filled in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from guard.policy.conditions import ConditionSpec, ExpressionSpec
from guard.policy.expert_sets import ForeignSets, NamedProfile, SetBuilder
from guard.policy.explain import path_text
from guard.policy.fault import Fault
from guard.policy.measures import MeasureError, calibrated, measure
from guard.policy.model import (
    ALL_REQUESTS,
    Action,
    All,
    AnyOf,
    Block,
    Condition,
    ConditionKind,
    ExpertSet,
    Expression,
    Mask,
    ModelRequirement,
    Not,
    Observe,
    Persist,
    Phase,
    Policy,
    PolicyException,
    Profile,
    RequestMatch,
    Rule,
)
from guard.policy.nodes import Node, locate
from guard.policy.references import foreign_names
from guard.policy.schema import (
    ActionSpec,
    EntrySpec,
    ExceptionSpec,
    ModelSpec,
    PolicyDocument,
    RequestMatchSpec,
    RuleSpec,
)

_Path = tuple[str | int, ...]


def build_policy(
    document: PolicyDocument,
    root: Node,
    profile: Profile | None,
    named_profile: NamedProfile,
    foreign: ForeignSets,
) -> tuple[Policy, list[Fault]]:
    """All are of one document, and `references` found nothing wrong with it. The policy is whole where
    there are no faults.

    profile: that of spec.profile
    """
    metadata, spec = document.metadata, document.spec
    builder = SetBuilder(root, profile, named_profile)
    sets = builder.build(spec.experts)
    for name in foreign_names(root):
        if (foreign_set := foreign.find(name, root.location.file)) is not None:
            sets[name] = replace(foreign_set, name=name)
    rules = [
        _RuleBuilder(root, ("spec", "rules", index), sets, profile) for index in range(len(spec.rules))
    ]
    policy = Policy(
        name=metadata.name,
        location=locate(root, ("metadata", "name")),
        mode=spec.mode,
        description=metadata.description,
        severity=metadata.severity,
        maturity=metadata.maturity,
        labels=metadata.labels,
        model=None if spec.model is None else _requirement(spec.model, root),
        profile=profile,
        set_profiles=tuple(
            other
            for file, other in builder.profiles.items()
            if profile is None or file != profile.location.file
        ),
        experts=sets,
        rules=tuple(
            rule.build(of_rule, document) for rule, of_rule in zip(rules, spec.rules, strict=True)
        ),
        exceptions=tuple(
            _exception(exception, root, index) for index, exception in enumerate(spec.exceptions)
        ),
    )
    return policy, builder.faults + [fault for rule in rules for fault in rule.faults]


def build_sets(
    sets: Mapping[str, tuple[EntrySpec, ...]],
    root: Node,
    profile: Profile | None,
    named_profile: NamedProfile,
) -> tuple[dict[str, ExpertSet], list[Fault]]:
    """The sets of a document of `kind: ExpertSets`."""
    builder = SetBuilder(root, profile, named_profile)
    return builder.build(sets), builder.faults


def _requirement(spec: ModelSpec, root: Node) -> ModelRequirement:
    return ModelRequirement(
        location=locate(root, ("spec", "model"), key=True),
        architecture=spec.architecture,
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
    )


def _match(spec: RequestMatchSpec, sample: float = 1.0) -> RequestMatch:
    return RequestMatch(
        lora_adapters=None if spec.lora_adapters is None else frozenset(spec.lora_adapters),
        labels={name: frozenset(values) for name, values in (spec.labels or {}).items()},
        sample=sample,
    )


def _exception(spec: ExceptionSpec, root: Node, index: int) -> PolicyException:
    return PolicyException(
        name=spec.name,
        location=locate(root, ("spec", "exceptions", index)),
        match=_match(spec.match),
        rules=frozenset(spec.rules or ()),
        until=spec.until,
    )


class _RuleBuilder:
    """One rule; it counts the conditions, so that each has a label of its own."""

    def __init__(
        self, root: Node, path: _Path, sets: dict[str, ExpertSet], profile: Profile | None
    ) -> None:
        self._root = root
        self._path = path
        self._sets = sets
        self._profile = profile
        self._phase = Phase.ANY
        self._seen: Counter[ConditionKind] = Counter()
        self.faults: list[Fault] = []

    def build(self, rule: RuleSpec, document: PolicyDocument) -> Rule:
        persist, match = rule.persist, _match(rule.match, rule.match.sample)
        self._phase = rule.match.phase
        return Rule(
            name=rule.name,
            when=self._expression(rule.when, (*self._path, "when")),
            then=self._action(rule.then),
            location=locate(self._root, self._path),
            phase=rule.match.phase,
            persist=Persist(persist.hits, persist.of) if persist else Persist(),
            on_error=rule.on_error or document.spec.on_error,
            match=ALL_REQUESTS if match.is_all else match,
        )

    def _expression(self, spec: ExpressionSpec, path: _Path) -> Expression:
        if spec.all_ is not None:
            return All(self._children(spec.all_, (*path, "all")))
        if spec.any_ is not None:
            return AnyOf(self._children(spec.any_, (*path, "any")))
        if spec.not_ is not None:
            return Not(self._expression(spec.not_, (*path, "not")))
        for kind in ConditionKind:
            words: ConditionSpec | None = getattr(spec, kind.value)
            if kind is not ConditionKind.ALWAYS and words is not None:
                return self._condition(kind, words, (*path, kind.value))
        return self._labelled(ConditionKind.ALWAYS, (*path, ConditionKind.ALWAYS.value))

    def _children(self, specs: tuple[ExpressionSpec, ...], path: _Path) -> tuple[Expression, ...]:
        return tuple(self._expression(spec, (*path, index)) for index, spec in enumerate(specs))

    def _labelled(self, kind: ConditionKind, path: _Path) -> Condition:
        self._seen[kind] += 1
        number = self._seen[kind]
        label = kind.value if number == 1 else f"{kind.value}#{number}"
        return Condition(kind, label, locate(self._root, path, key=True))

    def _condition(self, kind: ConditionKind, spec: ConditionSpec, path: _Path) -> Condition:
        named = self._labelled(kind, path)
        try:
            if spec.budget is not None:
                condition = calibrated(
                    spec,
                    kind,
                    self._phase,
                    spec.budget,
                    self._sets.__getitem__,
                    self._profile,
                    named.location,
                )
            else:
                assert spec.comparison is not None, "the schema asks for a threshold"
                comparison, threshold = spec.comparison
                condition = replace(
                    measure(
                        kind,
                        spec,
                        comparison,
                        self._sets.__getitem__,
                        self._profile,
                        named.location,
                    ),
                    comparison=comparison,
                    threshold=threshold,
                )
        except MeasureError as error:
            whole = (*path, error.key) if error.key else path
            place = locate(self._root, whole, key=not error.key)
            self.faults.append(Fault(place, f"{path_text(whole)}: {error.text}"))
            return named
        return replace(condition, label=named.label)

    def _action(self, spec: ActionSpec | None) -> Action:
        if spec is not None and spec.mask is not None:
            return Mask(
                experts=self._sets[spec.mask.experts],
                location=locate(self._root, (*self._path, "then", "mask"), key=True),
                method=spec.mask.method,
                until=spec.mask.until,
            )
        if spec is not None and spec.block is not None:
            return Block(spec.block.message)
        return Observe()
