"""Policy files -> PolicySet, or every fault in them, each with file, line and column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from guard.policy.build import build_policy, build_sets
from guard.policy.expert_sets import ForeignSets
from guard.policy.explain import explain
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.model import ExpertSet, Policy, PolicySet, Profile
from guard.policy.never_mask import never_mask_faults
from guard.policy.nodes import Node, ScalarNode, find, plain
from guard.policy.profile import load_profile
from guard.policy.references import (
    duplicate_policy_faults,
    foreign_faults,
    foreign_names,
    reference_faults,
)
from guard.policy.revision import revision_of
from guard.policy.schema import (
    EXPERT_SETS,
    POLICY,
    POLICY_TEST,
    ExpertSetsDocument,
    PolicyDocument,
)
from guard.policy.texts import (
    PolicyTexts,
    Text,
    profile_path,
    read_policies,
    read_profile,
    with_profiles,
)
from guard.policy.yaml12 import read_documents


def load_policies(path: Path | str) -> PolicySet:
    """Load a file, or every *.yaml and *.yml below a folder.

    In a folder, names that begin with '.' are passed over. A folder without policies is an empty
    set; a file without one is a fault.

    Raises:
        PolicyError: with all faults of all files.
    """
    return load_texts(read_policies(path))


def parse_policies(text: str, file: str = "<text>") -> PolicySet:
    """Load policies from text; locations name `file`.

    Raises:
        PolicyError: with all faults.
    """
    return load_texts(with_profiles([Text(file, text)], read_profile))


def load_texts(texts: PolicyTexts) -> PolicySet:
    """Load what `read_policies` read, here or elsewhere; no file is touched.

    Raises:
        PolicyError: with all faults of all files.
    """
    faults = list(texts.faults)
    loader = _Loader(_Profiles(texts.profiles))
    for file, text, _ in texts.policies:
        roots, yaml_faults = read_documents(text, file)
        faults += yaml_faults
        if not roots and not yaml_faults:
            faults.append(
                Fault(Location(file, 1, 1), "the file holds no policy; write one or remove it")
            )
        for root in roots:
            loader.add(root)
    policies = loader.build()
    faults += loader.faults
    if faults:
        raise PolicyError(list(dict.fromkeys(faults)))
    policies.sort(key=lambda policy: (-policy.severity.rank, policy.name))
    loaded = PolicySet(tuple(policies), revision_of(policies))
    if faults := never_mask_faults(loaded):
        raise PolicyError(faults)
    return loaded


_Document = TypeVar("_Document", PolicyDocument, ExpertSetsDocument)


class _Loader:
    """Takes documents one after the other; expert sets are built before the policies that name them."""

    def __init__(self, profiles: _Profiles) -> None:
        self._profiles = profiles
        self._foreign = ForeignSets()
        self._policies: list[tuple[Node, PolicyDocument | None]] = []  # None: it did not validate
        self.faults: list[Fault] = []

    def add(self, root: Node) -> None:
        match find(root, ("kind",)):
            case ScalarNode(kind) if kind == POLICY_TEST:
                pass
            case ScalarNode(kind) if kind == EXPERT_SETS:
                self._add_sets(root)
            case _:
                self._policies.append((root, self._validated(root, PolicyDocument)))

    def _add_sets(self, root: Node) -> None:
        built: dict[str, ExpertSet] = {}
        document = self._validated(root, ExpertSetsDocument)
        self.faults += reference_faults(root)
        if document is not None:
            profile = self._profile(root)
            if _has_profile(root, profile):
                built, faults = build_sets(document.spec.experts, root, profile, self._profiles.named)
                self.faults += faults
        self._foreign.add(root, built)

    def build(self) -> list[Policy]:
        policies = []
        for root, document in self._policies:
            if document is None and not _says_policy(root):
                continue
            own_faults = [*reference_faults(root), *foreign_faults(root, self._foreign.find)]
            profile = self._profile(root)
            is_whole = document is not None and not own_faults and _has_profile(root, profile)
            if document is not None and is_whole and self._has_sets(root):
                policy, own_faults = build_policy(
                    document, root, profile, self._profiles.named, self._foreign
                )
                policies.append(policy)
            self.faults += own_faults
        self.faults += duplicate_policy_faults(root for root, _ in self._policies)
        return policies

    def _has_sets(self, root: Node) -> bool:
        """The sets of other files that it names are whole; else their own faults say it."""
        found = [self._foreign.find(name, root.location.file) for name in foreign_names(root)]
        return all(foreign_set is not None for foreign_set in found)

    def _validated(self, root: Node, schema: type[_Document]) -> _Document | None:
        try:
            return schema.model_validate(plain(root))
        except ValidationError as error:
            self.faults += explain(error, root)
            return None

    def _profile(self, root: Node) -> Profile | None:
        match find(root, ("spec", "profile")):
            case ScalarNode(str(named), location) if named:
                try:
                    return self._profiles.named(named, location)
                except PolicyError as error:
                    self.faults += error.faults
        return None


def _says_policy(root: Node) -> bool:
    """The document does not say that it is something else, which would not be ours to judge."""
    match find(root, ("kind",)):
        case ScalarNode(kind):
            return kind == POLICY
        case _:
            return True


def _has_profile(root: Node, profile: Profile | None) -> bool:
    """Where spec.profile names one it was read: what needs it says nothing where it was not."""
    return profile is not None or find(root, ("spec", "profile")) is None


class _Profiles:
    """The profiles of a set, each parsed once: its policies usually share their model's."""

    def __init__(self, texts: tuple[Text, ...]) -> None:
        self._texts = {text.file: text for text in texts}
        self._parsed: dict[str, Profile] = {}

    def named(self, name: str, location: Location) -> Profile:
        """Raises PolicyError: at `location` if the file could not be read, else at its place in it."""
        path = str(profile_path(name, location))
        if path not in self._parsed:
            text = self._texts.get(path, Text(path, "", "is not among the files that were read"))
            self._parsed[path] = load_profile(text, location)
        return replace(self._parsed[path], named_at=location)
