"""Policy files -> PolicySet, or every fault in them, each with file, line and column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from guard.policy.build import build_policy
from guard.policy.explain import explain, is_other_kind
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.model import PolicySet, Profile
from guard.policy.never_mask import never_mask_faults
from guard.policy.nodes import Node, ScalarNode, find, plain
from guard.policy.profile import load_profile
from guard.policy.references import duplicate_policy_faults, reference_faults
from guard.policy.revision import revision_of
from guard.policy.schema import PolicyDocument
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
    documents: list[_Document] = []
    profiles = _Profiles(texts.profiles)
    for file, text, _ in texts.policies:
        roots, yaml_faults = read_documents(text, file)
        faults += yaml_faults
        if not roots and not yaml_faults:
            faults.append(
                Fault(Location(file, 1, 1), "the file holds no policy; write one or remove it")
            )
        for root in roots:
            document, document_faults = _check(root, profiles)
            documents.append(document)
            faults += document_faults
    faults += duplicate_policy_faults(document.root for document in documents)
    if faults:
        raise PolicyError(list(dict.fromkeys(faults)))
    policies = [
        build_policy(document.schema, document.root, document.profile)
        for document in documents
        if document.schema is not None
    ]
    policies.sort(key=lambda policy: (-policy.severity.rank, policy.name))
    loaded = PolicySet(tuple(policies), revision_of(policies))
    if faults := never_mask_faults(loaded):
        raise PolicyError(faults)
    return loaded


class _Document(NamedTuple):
    root: Node
    schema: PolicyDocument | None  # None: it did not validate
    profile: Profile | None  # None: it names none, or a bad one


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


def _check(root: Node, profiles: _Profiles) -> tuple[_Document, list[Fault]]:
    try:
        schema = PolicyDocument.model_validate(plain(root))
    except ValidationError as error:
        faults = explain(error, root)
        if not is_other_kind(error):
            faults += reference_faults(root) + _profile(root, profiles)[1]
        return _Document(root, None, None), faults
    profile, faults = _profile(root, profiles)
    return _Document(root, schema, profile), reference_faults(root) + faults


def _profile(root: Node, profiles: _Profiles) -> tuple[Profile | None, list[Fault]]:
    match find(root, ("spec", "profile")):
        case ScalarNode(str(named), location) if named:
            try:
                return profiles.named(named, location), []
            except PolicyError as error:
                return None, list(error.faults)
        case _:
            return None, []
