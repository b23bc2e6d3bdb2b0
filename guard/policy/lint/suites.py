"""Which policies have a test suite beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from guard.policy.model import Policy
from guard.policy.nodes import ScalarNode, find
from guard.policy.schema import POLICY_TEST
from guard.policy.texts import SUFFIXES
from guard.policy.yaml12 import MAX_FILE_BYTES, read_documents


def tested(policies: Iterable[Policy]) -> set[str]:
    """Names of the policies in whose folder a document of kind: PolicyTest lies."""
    folders: dict[Path, bool] = {}
    names = set()
    for policy in policies:
        folder = Path(policy.location.file).parent
        if folder not in folders:
            folders[folder] = _has_suite(folder)
        if folders[folder]:
            names.add(policy.name)
    return names


def _has_suite(folder: Path) -> bool:
    """What cannot be read is no suite: where it should be one, `moe-guard test` says why."""
    if not os.path.isdir(folder):
        return False
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES))
    return any(_is_suite(file) for file in files if file.is_file() and not file.name.startswith("."))


def _is_suite(file: Path) -> bool:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return False
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    if POLICY_TEST not in text:
        return False
    for root in read_documents(text, str(file)).roots:
        match find(root, ("kind",)):
            case ScalarNode(kind) if kind == POLICY_TEST:
                return True
    return False
