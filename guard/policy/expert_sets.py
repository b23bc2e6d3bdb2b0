"""Named sets of experts: from entries to an `ExpertSet`, and sets that lie in other files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from guard.policy.explain import path_text
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.model import Expert, ExpertEntry, ExpertSet, Profile
from guard.policy.nodes import MapNode, Node, find, locate
from guard.policy.references import entry_layers, expert_weights
from guard.policy.schema import EntrySpec
from guard.policy.suggest import did_you_mean, one_of, quote

_Path = tuple[str | int, ...]

NamedProfile = Callable[[str, Location], Profile]
"""The profile that a document names at a place. Raises PolicyError."""


class SetBuilder:
    """Builds the sets of one document, `spec.experts` in it. What it builds is whole where it notes no
    faults.

    profiles: those that entries named, by their file
    """

    def __init__(self, root: Node, own_profile: Profile | None, named_profile: NamedProfile) -> None:
        self._root = root
        self._own = own_profile
        self._named = named_profile
        self.profiles: dict[str, Profile] = {}
        self.faults: list[Fault] = []

    def build(self, sets: Mapping[str, tuple[EntrySpec, ...]]) -> dict[str, ExpertSet]:
        return {name: self._set(name, entries) for name, entries in sets.items()}

    def _set(self, name: str, entries: tuple[EntrySpec, ...]) -> ExpertSet:
        path: _Path = ("spec", "experts", name)
        built: list[ExpertEntry] = []
        for index, entry in enumerate(entries):
            if entry.set is None:
                place = locate(self._root, (*path, index))
                built.append(ExpertEntry(entry_layers(entry), expert_weights(entry), place))
            else:
                built += self._of_profile(entry, entry.set, (*path, index))
        expert_set = ExpertSet(name, tuple(built), locate(self._root, path, key=True))
        if any(entry.set is not None for entry in entries):
            self._check_weights(expert_set)
        return expert_set

    def _of_profile(self, entry: EntrySpec, wanted: str, path: _Path) -> tuple[ExpertEntry, ...]:
        profile = self._own
        if entry.profile is not None:
            try:
                profile = self._named(entry.profile, locate(self._root, (*path, "profile")))
            except PolicyError as error:
                self.faults += error.faults
                return ()
        if profile is None:
            self._fault(
                path, "set", f"{quote(wanted)} is a set of which profile? Name it: profile: PATH"
            )
            return ()
        self.profiles[profile.location.file] = profile
        if wanted not in profile.sets:
            known = f"it has {one_of(profile.sets, 'and')}" if profile.sets else "it has no sets"
            hint = did_you_mean(wanted, profile.sets) or f"; {known}"
            file = profile.location.file
            self._fault(path, "set", f"the profile {file} has no set {quote(wanted)}{hint}")
            return ()
        place = locate(self._root, path)
        return tuple(replace(entry, location=place) for entry in profile.sets[wanted].entries)

    def _check_weights(self, expert_set: ExpertSet) -> None:
        """Of what the file itself lists, `references` has said it."""
        weights: dict[Expert, float] = {}
        for entry in expert_set.entries:
            for layer in entry.layers:
                for id_, weight in entry.weights.items():
                    before = weights.setdefault(Expert(layer, id_), weight)
                    if before != weight:
                        text = (
                            f"expert {id_} of layer {layer} has weight {weight:g} here, but {before:g} "
                            "above in the set; give it one weight"
                        )
                        self.faults.append(Fault(entry.location, text))
                        return

    def _fault(self, path: _Path, key: str, text: str) -> None:
        whole = (*path, key)
        self.faults.append(Fault(locate(self._root, whole), f"{path_text(whole)}: {text}"))


class _ForeignSet(NamedTuple):
    file: Path
    location: Location
    experts: ExpertSet | None  # None: it has faults of its own


class ForeignSets:
    """The sets of a policy set's `kind: ExpertSets` documents, by `file-name/set`."""

    def __init__(self) -> None:
        self._sets: dict[str, list[_ForeignSet]] = {}

    def add(self, root: Node, built: Mapping[str, ExpertSet]) -> None:
        """root: the document, of which perhaps only the names can be read."""
        file = Path(root.location.file)
        sets = find(root, ("spec", "experts"))
        if not isinstance(sets, MapNode):
            return
        for name in sets.entries:
            key = f"{file.stem}/{name}"
            self._sets.setdefault(key, []).append(
                _ForeignSet(file, sets.entries[name].key_location, built.get(str(name)))
            )

    def find(self, name: str, file: str) -> ExpertSet | None:
        """The set that a document of `file` means; None where it has faults of its own.

        Raises KeyError: with what is wrong with the name.
        """
        found = self._sets.get(name, [])
        if len(found) > 1:
            found = [one for one in found if one.file.parent == Path(file).parent] or found
        if len(found) == 1:
            return found[0].experts
        if found:
            files = one_of([str(one.location) for one in found], "and")
            raise KeyError(f"the set {quote(name)} is in {files}; rename one of the files or sets")
        hint = did_you_mean(name, self._sets)
        known = (
            f"known: {', '.join(self._sets)}"
            if self._sets
            else "no ExpertSets were loaded with it; give the folder that holds both files"
        )
        raise KeyError(f"there is no set {quote(name)}{hint or f'; {known}'}")
