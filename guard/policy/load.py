"""Policy files -> PolicySet, or every fault in them, each with file, line and column."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
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
from guard.policy.profile import load_profile, profile_path
from guard.policy.references import duplicate_policy_faults, reference_faults
from guard.policy.revision import revision_of
from guard.policy.schema import PolicyDocument
from guard.policy.yaml12 import MAX_FILE_BYTES, read_documents

_SUFFIXES = (".yaml", ".yml")


def load_policies(path: Path | str) -> PolicySet:
    """Load a file, or every *.yaml and *.yml below a folder.

    In a folder, names that begin with '.' are passed over. A folder without policies is an empty
    set; a file without one is a fault.

    Raises:
        PolicyError: with all faults of all files.
    """
    texts, faults = _read(Path(path))
    return _load(texts, faults)


def parse_policies(text: str, file: str = "<text>") -> PolicySet:
    """Load policies from text; locations name `file`.

    Raises:
        PolicyError: with all faults.
    """
    return _load([_Text(file, text)], [])


class _Text(NamedTuple):
    file: str
    text: str


class _Document(NamedTuple):
    root: Node
    schema: PolicyDocument | None  # None: it did not validate
    profile: Profile | None  # None: it names none, or a bad one


def _load(texts: list[_Text], faults: list[Fault]) -> PolicySet:
    documents: list[_Document] = []
    profiles: _Profiles = {}
    for file, text in texts:
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


_Profiles = dict[Path, Profile]
"""Those that were read already: policies of one set usually share their model's."""


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
            path = profile_path(named, location)
            try:
                profile = profiles.get(path) or load_profile(path, location)
            except PolicyError as error:
                return None, list(error.faults)
            profiles[path] = profile
            return replace(profile, named_at=location), []
        case _:
            return None, []


def _read(path: Path) -> tuple[list[_Text], list[Fault]]:
    """The texts of all files at `path`, and a fault for each that cannot be read."""
    faults: list[Fault] = []
    files = sorted(_files_below(path, faults)) if os.path.isdir(path) else [path]
    texts = []
    for file in files:
        text = _read_file(file, faults)
        if text is not None:
            texts.append(_Text(str(file), text))
    return texts, faults


def _files_below(folder: Path, faults: list[Fault]) -> Iterator[Path]:
    """Links are followed: Kubernetes mounts a ConfigMap as links into a hidden folder `..data`."""

    def unreadable(error: OSError) -> None:
        faults.append(Fault(Location(str(error.filename)), f"cannot be read: {error.strerror}"))

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        if real not in seen:
            seen.add(real)
            for name in names:
                if name[0] != "." and name.lower().endswith(_SUFFIXES):
                    yield Path(parent, name)


def _read_file(file: Path, faults: list[Fault]) -> str | None:
    place = Location(str(file))
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            faults.append(Fault(place, "is no regular file; give a YAML file or a folder of them"))
            return None
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        message = "there is no such file or folder; give a policy file or a folder of *.yaml files"
        faults.append(Fault(place, message))
        return None
    except OSError as error:
        faults.append(Fault(place, f"cannot be read: {error.strerror}"))
        return None
    if len(content) > MAX_FILE_BYTES:
        faults.append(Fault(place, f"is larger than {MAX_FILE_BYTES} bytes; split it"))
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        place = Location(str(file), before.count(b"\n") + 1, column)
        faults.append(Fault(place, "is not UTF-8 from here on; save the file as UTF-8"))
        return None
