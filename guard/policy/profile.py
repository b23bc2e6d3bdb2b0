"""A model's profile: what is known of its experts, read from JSON.

A profile is named by `spec.profile`, or by an entry of a set, relative to the folder of the policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pydantic import ValidationError

from guard.policy.explain import explain, path_text
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.json_nodes import read_json
from guard.policy.measures import MeasureError, is_same, measure
from guard.policy.model import (
    Baselines,
    CalibratedThreshold,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    ModelRequirement,
    NeverMask,
    Probe,
    Profile,
)
from guard.policy.nodes import Node, locate, plain
from guard.policy.profile_schema import CalibratedThresholdSpec, NeverMaskSpec, ProfileDocument
from guard.policy.references import MAX_EXPERTS, entry_layers, expert_weights
from guard.policy.schema import ListedEntrySpec
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.policy.texts import Text

_Path = tuple[str | int, ...]


def load_profile(file: Text, named_at: Location) -> Profile:
    """Raises PolicyError: at `named_at` if the file could not be read, else at the place in it."""
    if file.problem:
        raise PolicyError([Fault(named_at, f"the profile {file.file} {file.problem}")])
    root = read_json(file.text, file.file)
    try:
        document = ProfileDocument.model_validate(plain(root))
    except ValidationError as error:
        raise PolicyError(explain(error, root)) from error
    builder = _Builder(document, root, named_at)
    profile = builder.build()
    if builder.faults:
        raise PolicyError(builder.faults)
    return profile


class _Builder:
    def __init__(self, document: ProfileDocument, root: Node, named_at: Location) -> None:
        self._document = document
        self._root = root
        self._named_at = named_at
        self._spare_experts = MAX_EXPERTS
        self.faults: list[Fault] = []

    def build(self) -> Profile:
        model = self._document.model
        sets = self._sets()
        self._check_evidence()
        profile = Profile(
            location=Location(self._root.location.file),
            named_at=self._named_at,
            digest=_digest(self._root),
            model=ModelRequirement(
                location=locate(self._root, ("model",), key=True),
                architecture=model.architecture,
                layers=model.layers,
                experts=model.experts,
                top_k=model.top_k,
            ),
            never_mask=(*self._never_mask(), *self._protective(sets)),
            sets=sets,
            baselines=self._baselines(),
            probes=self._probes(),
            fingerprint=model.fingerprint,
        )
        return replace(profile, thresholds=self._thresholds(profile))

    def _never_mask(self) -> tuple[NeverMask, ...]:
        return tuple(
            NeverMask(
                layers=_numbers([entry.layer] if entry.layer is not None else [], entry.layers or ()),
                experts=_numbers([], entry.experts),
                reason=entry.reason,
                location=locate(self._root, ("neverMask", index)),
            )
            for index, entry in enumerate(self._document.never_mask)
            if self._has_room(entry, ("neverMask", index))
        )

    def _has_room(self, entry: ListedEntrySpec | NeverMaskSpec, path: _Path) -> bool:
        """Whether an entry may be written out. A short one can stand for millions of experts."""
        layers = 1 if entry.layer is not None else sum(map(len, entry.layers or ()))
        weights = entry.weights if isinstance(entry, ListedEntrySpec) else None
        experts = sum(map(len, entry.experts or ())) if weights is None else len(weights)
        had_room = self._spare_experts >= 0
        self._spare_experts -= layers * experts
        if had_room and self._spare_experts < 0:
            text = f"the profile's sets and neverMask have more than {MAX_EXPERTS} experts"
            self._fault(path, f"{text}; take some out")
        return self._spare_experts >= 0

    def _protective(self, sets: Mapping[str, ExpertSet]) -> Iterator[NeverMask]:
        """Masking what makes a model refuse is an attack, so it takes a word to that effect."""
        for name, spec in self._document.protective.items():
            path: _Path = ("protective", name)
            if name not in sets:
                known = f"it has {one_of(sets, 'and')}" if sets else "it has no sets"
                hint = did_you_mean(name, sets) or f"; {known}"
                self._fault(path, f"the profile has no set {quote(name)}{hint}")
            elif spec.override is None:
                place = locate(self._root, path, key=True)
                reason = f"{name} is protective; an `override` there, which says why, allows it"
                for entry in sets[name].entries:
                    yield NeverMask(entry.layers, tuple(sorted(entry.weights)), reason, place)

    def _sets(self) -> dict[str, ExpertSet]:
        sets = {}
        for name, entries in self._document.sets.items():
            path: _Path = ("sets", name)
            not_to_mask = self._not_to_mask(name)
            built = [
                ExpertEntry(
                    entry_layers(entry),
                    expert_weights(entry),
                    locate(self._root, (*path, index)),
                    not_to_mask,
                )
                for index, entry in enumerate(entries)
                if self._has_room(entry, (*path, index))
            ]
            sets[name] = ExpertSet(name, tuple(built), locate(self._root, path, key=True))
        return sets

    def _not_to_mask(self, name: str) -> str:
        """Why a policy may not mask that set; empty where it may."""
        check = self._document.causal.get(name)
        if check is None or check.passed or check.override is not None:
            return ""
        place = locate(self._root, ("causal", name), key=True)
        return (
            f"the set {name!r} did not pass its causal check ({place}): masking it does not do what it "
            "is for, or harms the rest; observe or block by it, or give the check an `override` that "
            "says why"
        )

    def _check_evidence(self) -> None:
        for key, found in (
            ("statistics", self._document.statistics),
            ("causal", self._document.causal),
        ):
            for name in found:
                known = {*self._document.sets, *(self._document.probes if key == "statistics" else ())}
                if name not in known:
                    hint = did_you_mean(name, sorted(known))
                    self._fault((key, name), f"the profile has no set {quote(name)}{hint}")

    def _baselines(self) -> Baselines | None:
        spec = self._document.baselines
        if spec is None:
            return None
        num_experts, top_k = self._document.model.experts, self._document.model.top_k
        for layer, rates in spec.rates.items():
            path = ("baselines", "rates", str(layer))
            if num_experts is not None and len(rates) != num_experts:
                self._fault(
                    path, f"{len(rates)} rates, but the model has {num_experts} experts a layer"
                )
            if top_k is not None and abs(sum(rates) - top_k) > 0.02 * top_k:
                text = (
                    f"the rates add up to {sum(rates):g}; those of a layer add up to its topK, {top_k}"
                )
                self._fault(path, text)
            elif not sum(rates):
                self._fault(path, "no expert has a rate above 0")
        return Baselines(spec.tokens, dict(spec.rates))

    def _probes(self) -> dict[str, Probe]:
        probes = {}
        for name, spec in self._document.probes.items():
            path: _Path = ("probes", name, "weights")
            entries, seen = [], set()
            for index, entry in enumerate(spec.weights):
                place = locate(self._root, (*path, index))
                if entry.layer in seen:
                    self._fault((*path, index), f"layer {entry.layer} is listed twice; join the two")
                seen.add(entry.layer)
                weights = {id_: weight + 0.0 for id_, weight in sorted(entry.weights.items())}
                entries.append(ExpertEntry((entry.layer,), weights, place))
            experts = ExpertSet(f"probe {name}", tuple(entries), locate(self._root, path))
            probes[name] = Probe(experts, spec.bias)
        return probes

    def _thresholds(self, profile: Profile) -> tuple[CalibratedThreshold, ...]:
        built: list[CalibratedThreshold] = []
        for index, spec in enumerate(self._document.thresholds):
            path: _Path = ("thresholds", index, "when")
            try:
                threshold = self._threshold(spec, index, profile)
            except MeasureError as error:
                self._fault((*path, error.key) if error.key else path, error.text)
                continue
            for before, other in enumerate(built):
                if other.phase is threshold.phase and is_same(other.condition, threshold.condition):
                    text = f"thresholds[{before}] is for the same condition; a budget would mean either"
                    self._fault(path, f"{text}; keep one")
            built.append(threshold)
        return tuple(built)

    def _threshold(
        self, spec: CalibratedThresholdSpec, index: int, profile: Profile
    ) -> CalibratedThreshold:
        def find_set(name: str) -> ExpertSet:
            if name not in profile.sets:
                known = f"it has {one_of(profile.sets, 'and')}" if profile.sets else "it has no sets"
                hint = did_you_mean(name, profile.sets) or f"; {known}"
                raise MeasureError("", f"the profile has no set {quote(name)}{hint}")
            return profile.sets[name]

        given = {kind: getattr(spec.when, kind.value, None) for kind in ConditionKind}
        kind, words = next((kind, words) for kind, words in given.items() if words is not None)
        direction, _ = spec.budgets[0].comparison
        place = locate(self._root, ("thresholds", index))
        condition = measure(kind, words, direction, find_set, profile, place)
        budgets = {budget.budget: budget.comparison for budget in spec.budgets}
        return CalibratedThreshold(condition, spec.phase, budgets)

    def _fault(self, path: _Path, text: str) -> None:
        self.faults.append(Fault(locate(self._root, path), f"{path_text(path)}: {text}"))


def _digest(root: Node) -> str:
    text = json.dumps(plain(root), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(single: list[int], ranges: tuple[range, ...]) -> tuple[int, ...]:
    return tuple(sorted({*single, *(number for numbers in ranges for number in numbers)}))
