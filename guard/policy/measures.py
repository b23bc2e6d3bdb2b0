"""What a condition reads: from its words to a `Condition`, with what a profile gives it.

Policies and a profile's thresholds build theirs here, so that the two are equal where they mean the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from guard.policy.conditions import (
    CoactivationMeasureSpec,
    DivergenceMeasureSpec,
    DormantMeasureSpec,
    MeasureSpec,
    ProbeMeasureSpec,
    ScoreMeasureSpec,
    SetMeasureSpec,
)
from guard.policy.fault import Location
from guard.policy.model import (
    Baselines,
    Comparison,
    Condition,
    ConditionKind,
    Expert,
    ExpertEntry,
    ExpertSet,
    NamedWindow,
    Phase,
    Probe,
    Profile,
    Together,
    TogetherIn,
    Window,
)
from guard.policy.suggest import did_you_mean, one_of, quote

FindSet = Callable[[str], ExpertSet]


class MeasureError(Exception):
    """What a condition needs and does not get. `key`: of the condition, or "" for all of it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key, self.text = key, text


def default_min_tokens(kind: ConditionKind, over: Window, comparison: Comparison) -> int:
    """The fewest tokens with which a condition's value is known, where it gives no minTokens."""
    counts = (ConditionKind.COUNT, ConditionKind.COACTIVATION, ConditionKind.DORMANT)
    if isinstance(over, NamedWindow) or (kind in counts and comparison.upward):
        return 1
    return over


def measure(
    kind: ConditionKind,
    spec: MeasureSpec,
    comparison: Comparison,
    find_set: FindSet,
    profile: Profile | None,
    location: Location,
) -> Condition:
    """A condition without its threshold.

    comparison: which way it points, for the default of minTokens
    Raises MeasureError where the profile lacks what the condition reads.
    """
    condition = Condition(
        kind=kind,
        label=kind.value,
        location=location,
        over=spec.over,
        min_tokens=spec.min_tokens or default_min_tokens(kind, spec.over, comparison),
    )
    match spec:
        case DormantMeasureSpec():
            experts = _dormant(spec, find_set, baselines_for(kind, profile), location)
            return replace(condition, experts=experts)
        case ProbeMeasureSpec():
            probe = _probe(spec, profile)
            return replace(condition, experts=probe.experts, bias=probe.bias)
        case DivergenceMeasureSpec():
            baselines = baselines_for(kind, profile)
            return replace(condition, baselines=baselines, reduce=spec.reduce)
        case ScoreMeasureSpec():
            return replace(condition, experts=find_set(spec.experts), bias=spec.bias)
        case CoactivationMeasureSpec():
            experts = find_set(spec.experts)
            return replace(condition, experts=experts, together=_together(spec))
        case SetMeasureSpec() if kind is ConditionKind.SUPPRESSED:
            experts, baselines = find_set(spec.experts), baselines_for(kind, profile)
            _check_measured(experts, baselines)
            return replace(condition, experts=experts, baselines=baselines)
        case SetMeasureSpec():
            return replace(condition, experts=find_set(spec.experts))
        case _:
            return condition


def calibrated(
    spec: MeasureSpec,
    kind: ConditionKind,
    phase: Phase,
    budget: float,
    find_set: FindSet,
    profile: Profile | None,
    location: Location,
) -> Condition:
    """A condition whose threshold is the profile's for a false-positive rate.

    Raises MeasureError where the profile has none for this condition.
    """
    if profile is None:
        text = "a budget takes its threshold from a profile; name one in spec.profile"
        raise MeasureError("budget", text)
    measures = {c: measure(kind, spec, c, find_set, profile, location) for c in Comparison}
    offered: set[float] = set()
    for threshold in profile.thresholds:
        points, _ = next(iter(threshold.budgets.values()))
        if threshold.phase is phase and is_same(threshold.condition, measures[points]):
            offered.update(threshold.budgets)
            if budget in threshold.budgets:
                comparison, value = threshold.budgets[budget]
                return replace(measures[points], comparison=comparison, threshold=value, budget=budget)
    if offered:
        known = one_of([f"{value:g}" for value in sorted(offered)])
        text = f"the profile {profile.location.file} has this condition calibrated to {known} only"
    else:
        text = (
            f"the profile {profile.location.file} has no threshold for this condition with the same "
            "set, window, minTokens and phase; calibrate it, or write above, atLeast, below or atMost"
        )
    raise MeasureError("budget", text)


def baselines_for(kind: ConditionKind, profile: Profile | None) -> Baselines:
    if profile is None:
        text = f"`{kind}` compares with a profile's baselines; name a profile in spec.profile"
        raise MeasureError("", text)
    if profile.baselines is None:
        text = f"`{kind}` needs baselines, and the profile {profile.location.file} has none"
        raise MeasureError("", text)
    return profile.baselines


def is_same(calibrated: Condition, wanted: Condition) -> bool:
    """Whether a threshold calibrated for one condition is right for another."""

    def key(condition: Condition) -> tuple[object, ...]:
        experts = condition.experts
        return (
            condition.kind,
            condition.over,
            condition.min_tokens,
            condition.bias,
            condition.together,
            condition.reduce,
            None if experts is None else dict(experts.weights),
        )

    return key(calibrated) == key(wanted)


def _together(spec: CoactivationMeasureSpec) -> Together:
    if spec.members is not None:
        return Together(spec.members, TogetherIn.MEMBERS)
    assert spec.layers is not None, "the schema asks for one of the two"
    return Together(spec.layers, TogetherIn.LAYERS)


def _dormant(
    spec: DormantMeasureSpec, find_set: FindSet, baselines: Baselines, location: Location
) -> ExpertSet:
    among = None if spec.experts is None else find_set(spec.experts)
    if among is not None:
        _check_measured(among, baselines)
    entries = []
    for layer, rates in sorted(baselines.rates.items()):
        ids = [
            id_
            for id_, rate in enumerate(rates)
            if rate < spec.baseline_below and (among is None or Expert(layer, id_) in among.weights)
        ]
        if ids:
            entries.append(ExpertEntry((layer,), dict.fromkeys(ids, 1.0), location))
    if not entries:
        lowest = min(rate for rates in baselines.rates.values() for rate in rates)
        text = (
            f"no expert{' of the set' if among else ''} has a baseline rate below "
            f"{spec.baseline_below:g}; the lowest in the profile is {lowest:g}"
        )
        raise MeasureError("baselineBelow", text)
    name = f"baselineBelow {spec.baseline_below!r}" + (f" of {among.name}" if among else "")
    return ExpertSet(name, tuple(entries), location)


def _check_measured(experts: ExpertSet, baselines: Baselines) -> None:
    for expert in experts.weights:
        if expert.id >= len(baselines.rates.get(expert.layer, ())):
            text = (
                f"the profile has no baseline of expert {expert.id} of layer {expert.layer}, which "
                f"is in the set {experts.name!r}"
            )
            raise MeasureError("experts", text)


def _probe(spec: ProbeMeasureSpec, profile: Profile | None) -> Probe:
    if profile is None:
        raise MeasureError("", "`probe` is a profile's; name a profile in spec.profile")
    probes: Mapping[str, Probe] = profile.probes
    file = profile.location.file
    if not probes:
        raise MeasureError("", f"the profile {file} has no probes")
    if spec.name is None:
        if len(probes) > 1:
            raise MeasureError("", f"the profile {file} has several probes; name: {one_of(probes)}")
        return next(iter(probes.values()))
    if spec.name not in probes:
        hint = did_you_mean(spec.name, probes) or f"; it has {one_of(probes, 'and')}"
        raise MeasureError("name", f"the profile {file} has no probe {quote(spec.name)}{hint}")
    return probes[spec.name]
