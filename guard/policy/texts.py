"""Reads a policy set, and nothing more: every file's text and every profile that policies name.

What is read is whole: it can be sent elsewhere and be parsed where the files are not. Reading
never raises; what could not be read stands in the texts, and `load_texts` tells it with its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from guard.policy.fault import Fault, Location
from guard.policy.nodes import ListNode, MapNode, Node, ScalarNode
from guard.policy.regular_file import NotRegularError, open_regular
from guard.policy.yaml12 import MAX_FILE_BYTES, read_documents

SUFFIXES: Final = (".yaml", ".yml")
MAX_PROFILE_BYTES: Final = 64 << 20
MAX_NAMES: Final = 10_000


class Text(NamedTuple):
    """A file's name, as locations give it, and what it holds. `problem`: why it could not be read."""

    file: str
    text: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PolicyTexts:
    """A policy set as it was read. Strings only, so any codec can carry it between processes."""

    policies: tuple[Text, ...]
    profiles: tuple[Text, ...] = ()  # by the path that `profile_path` gives
    faults: tuple[Fault, ...] = ()  # policy files that could not be read


def read_policies(path: Path | str) -> PolicyTexts:
    """Read a file, or every *.yaml and *.yml below a folder, and the profiles that they name.

    In a folder, names that begin with '.' are passed over. Profiles are looked for there and in the
    folder that it is in, and nowhere else: a policy's author may not be who runs the server.
    """
    faults: list[Fault] = []
    files = policy_files(Path(path), faults)
    texts = [Text(str(file), text) for file in files if (text := _read_file(file, faults)) is not None]
    reach = _reach_of(path)

    def profile(named: Path) -> Text:
        if Path(os.path.abspath(named)).is_relative_to(reach):
            return read_profile(named)
        return Text(str(named), "", f"lies outside of {reach}; put it beside the policies")

    return with_profiles(texts, profile, faults)


def _reach_of(path: Path | str) -> Path:
    """Where profiles of the policies at a path may lie. By names: links there are the operator's."""
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        folder = folder.parent
    above = folder.parent
    return folder if above == above.parent else above  # the whole file system would be no limit


def policy_files(path: Path, faults: list[Fault]) -> list[Path]:
    """The files that `read_policies` reads; folders that cannot be listed are faults."""
    return sorted(_files_below(path, faults)) if os.path.isdir(path) else [path]


def with_profiles(
    texts: Iterable[Text], read: Callable[[Path], Text], faults: Iterable[Fault] = ()
) -> PolicyTexts:
    """The texts, and by `read` each profile that they name."""
    texts = tuple(texts)
    named = sorted({profile_path(name, Location(file)) for file, name in _named_profiles(texts)})
    return PolicyTexts(texts, tuple(read(path) for path in named), tuple(faults))


def profile_path(named: str, named_at: Location) -> Path:
    """Where the profile lies that a policy names."""
    return Path(named_at.file).parent / named


def read_profile(path: Path) -> Text:
    """The text of a profile, or why there is none."""
    file = str(path)
    try:
        with open_regular(path) as stream:
            content = stream.read(MAX_PROFILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return Text(file, "", "is no file; give its path relative to the policy's folder")
    except OSError as error:
        return Text(file, "", f"cannot be read: {error.strerror}")
    except ValueError as error:
        return Text(file, "", f"cannot be read: {error}")
    return profile_text(file, content)


def profile_text(file: str, content: bytes) -> Text:
    """A profile's bytes as text, or why they are none."""
    if len(content) > MAX_PROFILE_BYTES:
        return Text(file, "", f"is larger than {MAX_PROFILE_BYTES} bytes")
    try:
        return Text(file, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Text(file, "", "is not UTF-8; save it as UTF-8")


def policy_text(file: str, content: bytes, faults: list[Fault]) -> str | None:
    """A policy file's bytes as text, or a fault."""
    if len(content) > MAX_FILE_BYTES:
        faults.append(Fault(Location(file), f"is larger than {MAX_FILE_BYTES} bytes; split it"))
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        place = Location(file, before.count(b"\n") + 1, column)
        faults.append(Fault(place, "is not UTF-8 from here on; save the file as UTF-8"))
        return None


def _named_profiles(texts: Iterable[Text]) -> Iterator[tuple[str, str]]:
    """(file, profile that it names): the words under a key `profile`, wherever it stands."""
    for file, text, _ in texts:
        if "profile" in text or "\\" in text:  # else no key can read so, and nothing need be parsed
            for root in read_documents(text, file).roots:
                for name in _values_of_profile(root):
                    yield file, name


def _values_of_profile(node: Node) -> Iterator[str]:
    match node:
        case MapNode(entries):
            for key, (_, value) in entries.items():
                match key, value:
                    case "profile", ScalarNode(str(name)) if name:
                        yield name
                    case "labels", _:
                        pass  # words of the operator's own
                    case _:
                        yield from _values_of_profile(value)
        case ListNode(items):
            for item in items:
                yield from _values_of_profile(item)


def _files_below(folder: Path, faults: list[Fault]) -> Iterator[Path]:
    """Links are followed: Kubernetes mounts a ConfigMap as links into a hidden folder `..data`. One
    that leads to all of a disk is a fault, not a wait."""

    def unreadable(error: OSError) -> None:
        faults.append(Fault(Location(str(error.filename)), f"cannot be read: {error.strerror}"))

    seen: set[str] = set()
    num_names = 0
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        num_names += len(folders) + len(names)
        if num_names > MAX_NAMES:
            message = f"holds more than {MAX_NAMES} files and folders; give one of policies alone"
            faults.append(Fault(Location(str(folder)), message))
            return
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        if real not in seen:
            seen.add(real)
            for name in names:
                if name[0] != "." and name.lower().endswith(SUFFIXES):
                    yield Path(parent, name)


def _read_file(file: Path, faults: list[Fault]) -> str | None:
    place = Location(str(file))
    try:
        with open_regular(file) as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except NotRegularError:
        faults.append(Fault(place, "is no regular file; give a YAML file or a folder of them"))
        return None
    except (FileNotFoundError, NotADirectoryError):
        message = "there is no such file or folder; give a policy file or a folder of *.yaml files"
        faults.append(Fault(place, message))
        return None
    except OSError as error:
        faults.append(Fault(place, f"cannot be read: {error.strerror}"))
        return None
    return policy_text(str(file), content, faults)
