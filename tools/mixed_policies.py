"""The policies that go with the mixed load: the policy library beside the demo's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from guard.cli.demonstration.assets import find_assets

_LIBRARY = Path(__file__).parents[1] / "policies"
_ENFORCED = "tenant-exception"


def write_policies(folder: Path) -> Path:
    """A policy set for the demo's model in which rules watch, mask, block and exempt."""
    assets = find_assets()
    shutil.copytree(_LIBRARY, folder / "library")
    shutil.copytree(assets.policies, folder / "demo" / "policies")
    shutil.copy(assets.folder / "profile.json", folder / "demo" / "profile.json")
    policy = folder / "library" / _ENFORCED / "policy.yaml"
    policy.write_text(policy.read_text("utf-8").replace("mode: audit", "mode: enforce"))
    return folder
