"""A validated document -> the `Policy` that it means, with every default filled in."""

from __future__ import annotations

from collections import Counter

from guard.policy.conditions import ExpressionSpec, ScoreSpec, ThresholdSpec
from guard.policy.fault import Location
from guard.policy.model import (
    Action,
    All,
    AnyOf,
    Block,
    Comparison,
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Expression,
    Mask,
    ModelRequirement,
    NamedWindow,
    Not,
    Observe,
    Persist,
    Policy,
    Profile,
    Rule,
    Window,
)
from guard.policy.nodes import Node, locate
from guard.policy.references import entry_layers, expert_weights
from guard.policy.schema import (
    ActionSpec,
    EntrySpec,
    PolicyDocument,
    RuleSpec,
)

_Path = tuple[str | int, ...]


def build_policy(document: PolicyDocument, root: Node, profile: Profile | None) -> Policy:
    """All are of one document, and `references` found nothing wrong with it."""
    metadata, spec = document.metadata, document.spec
    sets = {
        name: ExpertSet(
            name=name,
            entries=tuple(
                _entry(entry, locate(root, ("spec", "experts", name, index)))
                for index, entry in enumerate(entries)
            ),
            location=locate(root, ("spec", "experts", name), key=True),
        )
        for name, entries in spec.experts.items()
    }
    model = None
    if spec.model is not None:
        model = ModelRequirement(
            location=locate(root, ("spec", "model"), key=True),
            architecture=spec.model.architecture,
            layers=spec.model.layers,
            experts=spec.model.experts,
            top_k=spec.model.top_k,
        )
    return Policy(
        name=metadata.name,
        location=locate(root, ("metadata", "name")),
        mode=spec.mode,
        description=metadata.description,
        severity=metadata.severity,
        maturity=metadata.maturity,
        labels=metadata.labels,
        model=model,
        profile=profile,
        experts=sets,
        rules=tuple(
            _RuleBuilder(root, ("spec", "rules", index), sets).build(rule, document)
            for index, rule in enumerate(spec.rules)
        ),
    )


def default_min_tokens(kind: ConditionKind, over: Window, comparison: Comparison) -> int:
    """The fewest tokens with which a condition's value is known, where it gives no minTokens."""
    if isinstance(over, NamedWindow) or (kind is ConditionKind.COUNT and comparison.upward):
        return 1
    return over


def _entry(entry: EntrySpec, location: Location) -> ExpertEntry:
    return ExpertEntry(layers=entry_layers(entry), weights=expert_weights(entry), location=location)


class _RuleBuilder:
    """One rule; it counts the conditions, so that each has a label of its own."""

    def __init__(self, root: Node, path: _Path, sets: dict[str, ExpertSet]) -> None:
        self._root = root
        self._path = path
        self._sets = sets
        self._seen: Counter[ConditionKind] = Counter()

    def build(self, rule: RuleSpec, document: PolicyDocument) -> Rule:
        persist = rule.persist
        return Rule(
            name=rule.name,
            when=self._expression(rule.when, (*self._path, "when")),
            then=self._action(rule.then),
            location=locate(self._root, self._path),
            phase=rule.match.phase,
            persist=Persist(persist.hits, persist.of) if persist else Persist(),
            on_error=rule.on_error or document.spec.on_error,
        )

    def _expression(self, spec: ExpressionSpec, path: _Path) -> Expression:
        if spec.all_ is not None:
            return All(self._children(spec.all_, (*path, "all")))
        if spec.any_ is not None:
            return AnyOf(self._children(spec.any_, (*path, "any")))
        if spec.not_ is not None:
            return Not(self._expression(spec.not_, (*path, "not")))
        given: dict[ConditionKind, ThresholdSpec | None] = {
            ConditionKind.COUNT: spec.count,
            ConditionKind.RATE: spec.rate,
            ConditionKind.MASS: spec.mass,
            ConditionKind.SCORE: spec.score,
        }
        for kind, threshold in given.items():
            if threshold is not None:
                return self._condition(kind, threshold, (*path, kind.value))
        return self._labelled(ConditionKind.ALWAYS, (*path, ConditionKind.ALWAYS.value))

    def _children(self, specs: tuple[ExpressionSpec, ...], path: _Path) -> tuple[Expression, ...]:
        return tuple(self._expression(spec, (*path, index)) for index, spec in enumerate(specs))

    def _labelled(self, kind: ConditionKind, path: _Path) -> Condition:
        self._seen[kind] += 1
        number = self._seen[kind]
        label = kind.value if number == 1 else f"{kind.value}#{number}"
        return Condition(kind, label, locate(self._root, path, key=True))

    def _condition(self, kind: ConditionKind, spec: ThresholdSpec, path: _Path) -> Condition:
        comparison, threshold = spec.comparison
        named = self._labelled(kind, path)
        return Condition(
            kind=kind,
            label=named.label,
            location=named.location,
            experts=self._sets[spec.experts],
            over=spec.over,
            min_tokens=spec.min_tokens or default_min_tokens(kind, spec.over, comparison),
            comparison=comparison,
            threshold=threshold,
            bias=spec.bias if isinstance(spec, ScoreSpec) else 0.0,
        )

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
