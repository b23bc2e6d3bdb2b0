"""A policy set as one file: a gzip-compressed tar archive, as OPA's bundles are.

It is read in memory and never unpacked to disk. An archive comes from elsewhere: what it may hold is
said here, and anything else refuses it whole. Profiles are found in the archive only.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from guard.policy import Fault, PolicyError, PolicyTexts
from guard.policy.texts import SUFFIXES, Text, policy_text, profile_text, with_profiles
from guard.source.source import out_of_reach

PROFILE_SUFFIX: Final = ".json"
MANIFEST: Final = ".manifest"
"""The member that says which of a publisher's bundles this is; OPA's has that name, too."""

MAX_BUNDLE_BYTES: Final = 16 << 20
MAX_UNPACKED_BYTES: Final = 128 << 20
MAX_MEMBERS: Final = 10_000
MAX_SERIAL: Final = (1 << 53) - 1

_GZIP: Final = 31  # zlib's word for a gzip header, and the largest window


class Manifest(msgspec.Struct, frozen=True):
    """serial: 1 and on; each bundle that is published has a greater one"""

    serial: int


class Bundle(NamedTuple):
    texts: PolicyTexts
    serial: int


def read_bundle(data: bytes, name: str) -> PolicyTexts:
    """The *.yaml, *.yml and *.json files of an archive, by their paths below `name`.

    As in a folder, names that begin with '.' are passed over, and so are other kinds of files.

    Raises PolicyError for an archive that is damaged, too large, or holds what a bundle may not.
    """
    return _texts(dict(_files(_unpacked(data, name), name)))


def read_numbered_bundle(data: bytes, name: str) -> Bundle:
    """The same, with the serial number that its publisher gave it. Raises PolicyError without one."""
    files = dict(_files(_unpacked(data, name), name))
    content = files.pop(f"{name}/{MANIFEST}", None)
    if content is None:
        raise out_of_reach(name, f"has no {MANIFEST} with a serial; `moe-guard bundle build` writes it")
    serial = _serial(content, f"{name}/{MANIFEST}")
    return Bundle(_texts(files), serial)


def _texts(files: Mapping[str, bytes]) -> PolicyTexts:
    faults: list[Fault] = []
    texts = [
        Text(file, text)
        for file, content in sorted(files.items())
        if file.lower().endswith(SUFFIXES) and (text := policy_text(file, content, faults)) is not None
    ]

    def profile(path: Path) -> Text:
        content = files.get(posixpath.normpath(str(path)))
        if content is None or not str(path).lower().endswith(PROFILE_SUFFIX):
            return Text(str(path), "", "is no file of the bundle; put it in, as *.json")
        return profile_text(str(path), content)

    return with_profiles(texts, profile, faults)


def _serial(content: bytes, place: str) -> int:
    try:
        found = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise out_of_reach(place, f"is no manifest: {error}") from error
    if not 1 <= found.serial <= MAX_SERIAL:
        raise out_of_reach(place, f"serial is {found.serial}; it must be 1 to {MAX_SERIAL}")
    return found.serial


def _unpacked(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BUNDLE_BYTES:
        raise out_of_reach(name, f"the bundle is larger than {MAX_BUNDLE_BYTES} bytes")
    stream = zlib.decompressobj(_GZIP)
    try:
        unpacked = stream.decompress(data, MAX_UNPACKED_BYTES + 1)
    except zlib.error as error:
        raise out_of_reach(name, f"the bundle is no gzip-compressed archive: {error}") from error
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise out_of_reach(name, f"the bundle unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise out_of_reach(name, "the bundle breaks off, or something follows it")
    return unpacked


def _files(unpacked: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """(path below `name`, content) of each file that a policy set may need."""
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:", errorlevel=2) as archive:
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise out_of_reach(name, f"the bundle has more than {MAX_MEMBERS} members")
                path = _checked(member, name)
                if member.isdir():
                    continue
                if path in seen:
                    raise out_of_reach(name, f"the bundle holds {path!r} twice")
                seen.add(path)
                hidden = any(part.startswith(".") for part in path.split("/"))
                is_read = not hidden and path.lower().endswith((*SUFFIXES, PROFILE_SUFFIX))
                if is_read or path == MANIFEST:
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file"
                    yield f"{name}/{path}", content.read()
            rest = unpacked[archive.offset :]
    except PolicyError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise out_of_reach(name, f"the bundle is no tar archive: {error}") from error
    if rest.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise out_of_reach(name, "the bundle is damaged: what follows its last member is no member")


def _checked(member: tarfile.TarInfo, name: str) -> str:
    """The member's path, made plain. Raises PolicyError for one that no bundle needs."""
    shown = member.name if member.name.isprintable() else ascii(member.name)
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise out_of_reach(name, f"the bundle's member {shown!r} points outside of it")
    if not member.name.isprintable():
        raise out_of_reach(name, f"the bundle's member {shown} has a name that cannot be shown")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise out_of_reach(
            name, f"the bundle's member {shown!r} is no plain file or folder; leave links out"
        )
    return posixpath.normpath(member.name)
