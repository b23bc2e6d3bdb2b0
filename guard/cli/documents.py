"""JSON documents that commands of discovery take and give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard.discover.errors import DiscoverError


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


def write_text(path: Path, text: str) -> None:
    """Raises DiscoverError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiscoverError(f"{path}: cannot be written: {error.strerror}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
