"""Where the demo's model, policies and prompts lie: in the package, or in the checkout beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from guard.errors import GuardError


class DemoError(GuardError):
    """The demo cannot run as installed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """expect: what the demo's policies are meant to do with it, for the shown ones."""

    id: str
    topic: str
    text: str
    expect: str = ""


@dataclass(frozen=True, slots=True)
class Assets:
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def policies(self) -> Path:
        return self.folder / "policies"

    def prompts(self, name: str) -> list[Prompt]:
        lines = (self.folder / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [Prompt(r["id"], r["topic"], r["prompt"], r.get("expect", "")) for r in rows]


def find_assets() -> Assets:
    """Raises DemoError where there are none."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "_demo", package.parent / "demo"):
        if (folder / "model" / "config.json").is_file():
            return Assets(folder)
    raise DemoError(
        "the demo's model is not here; run the demo from a checkout, or install moe-guard from a "
        "wheel that holds it"
    )
