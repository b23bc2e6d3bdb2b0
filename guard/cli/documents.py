"""JSON documents that commands of discovery take and give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from guard.discover.errors import DiscoverError
from guard.policy.fault import Location
from guard.policy.profile import load_profile
from guard.policy.texts import Text


def read_document(path: Path) -> dict[str, Any]:
    """Raises DiscoverError where it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiscoverError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DiscoverError(f"{path}: is not a JSON object")
    return found


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Raises DiscoverError where it cannot be written."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Raises PolicyError where what would be written is no profile, DiscoverError as above."""
    load_profile(Text(str(path), json.dumps(profile)), Location(str(path)))
    write_document(path, profile)


def versions() -> dict[str, str]:
    """Of what a result rests on."""
    return {name: version(name) for name in ("moe-guard", "numpy", "scikit-learn", "scipy")}


def write_text(path: Path, text: str) -> None:
    """Raises DiscoverError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiscoverError(f"{path}: cannot be written: {error.strerror}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
