"""Policies, and bundles of them, as operators write them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

PROFILE = json.dumps({"apiVersion": "moe-guard/v1", "kind": "Profile", "model": {"architecture": "M"}})


def policy(name: str = "p", *, at_least: int = 1, profile: str = "") -> str:
    return (
        f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n"
        + (f"  profile: {profile}\n" if profile else "")
        + "  experts: {flagged: [{layer: 1, experts: 1}]}\n"
        f"  rules:\n    - {{name: r, when: {{count: {{experts: flagged, atLeast: {at_least}}}}}}}\n"
    )


def write(folder: Path, **texts: str) -> Path:
    """Each keyword a file NAME.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: str | bytes = b"", **attributes: object) -> Member:
    data = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


def archive(*members: Member) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(stream.getvalue(), mtime=0)


def bundle(**texts: str) -> bytes:
    """Each keyword a file policies/NAME.yaml."""
    return archive(*(member(f"policies/{name}.yaml", text) for name, text in texts.items()))
