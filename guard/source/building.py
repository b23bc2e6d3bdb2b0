"""Makes a bundle of a folder: what a server would read there and nothing else, always alike."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from guard.policy import Fault, Location, PolicyError, load_texts, read_policies
from guard.source.bundle import MANIFEST, MAX_BUNDLE_BYTES, MAX_SERIAL, Manifest, read_numbered_bundle
from guard.source.source import out_of_reach


def build_bundle(folder: Path, serial: int) -> bytes:
    """The archive of the policies below the folder and of the profiles that they name.

    Raises PolicyError for policies that are wrong, or whose profiles lie elsewhere.
    """
    if not folder.is_dir():
        raise out_of_reach(str(folder), "is no folder; give the one that has the policies in it")
    if not 1 <= serial <= MAX_SERIAL:
        raise out_of_reach(str(folder), f"the serial is {serial}; give 1 to {MAX_SERIAL}")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in _members(folder, serial):
            member = tarfile.TarInfo(name)  # of nobody, at no time
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    bundle = gzip.compress(stream.getvalue(), mtime=0)
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise out_of_reach(
            str(folder), f"the bundle has {len(bundle)} bytes, and may have {MAX_BUNDLE_BYTES}"
        )
    load_texts(read_numbered_bundle(bundle, str(folder)).texts)  # as the server will
    return bundle


def _members(folder: Path, serial: int) -> Iterator[tuple[str, bytes]]:
    texts = read_policies(folder)
    faults = [
        *texts.faults,
        *(Fault(Location(one.file), one.problem) for one in texts.profiles if one.problem),
    ]
    inside = {one.file: _inside(folder, one.file) for one in (*texts.policies, *texts.profiles)}
    faults += [
        Fault(Location(file), f"lies outside of {folder}, which the bundle is made of; put it inside")
        for file, name in inside.items()
        if name is None
    ]
    if faults:
        raise PolicyError(faults)
    yield MANIFEST, msgspec.json.encode(Manifest(serial))
    # Policies that lie in different folders reach one profile by different paths.
    yield from {
        str(inside[one.file]): one.text.encode() for one in (*texts.policies, *texts.profiles)
    }.items()


def _inside(folder: Path, file: str) -> str | None:
    relative = os.path.relpath(file, folder)
    return None if relative.startswith("..") else Path(relative).as_posix()
