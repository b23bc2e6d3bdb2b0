"""A process for each model runner, with an engine after another for each way of serving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.integration.offline import cases
from tests.integration.offline.engines import Engines

DRAFT_LAYERS = 2
DRAFT_TOKENS = 3

RUNNERS = ("eager", "v2")
SPECULATING = {
    "eager": ("draft", "ngram"),
    "v2": ("async-ngram",),
}
AHEAD = {"eager": ("async",), "v2": ("async",)}

ALL = [
    cases.case("text", cases.batch_of_16()[:8]),
    cases.mask_midway(["late"]),
    cases.blocks(["stop"]),
    cases.blocks(["stop-prompt"]) | {"name": "prompt-blocks"},
]

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": DRAFT_TOKENS,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


class ServingEngines(Engines):
    """The groups are the `RUNNERS`; every engine runs `ALL`, recorded, under the offline policies."""

    def _engines(self, group: str) -> list[dict[str, Any]]:
        # In this order: vLLM's CPU build starts no engine in a process that ran its n-gram proposer.
        ways = ("plain", *AHEAD[group], *SPECULATING[group])
        return [self._serving(way) for way in ways]

    def _serving(self, way: str) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if "ngram" in way:
            more = {"speculative_config": NGRAM, "disable_log_stats": False}
        elif way == "draft":
            draft = {
                "method": "draft_model",
                "model": str(self.folder / "draft"),
                "num_speculative_tokens": DRAFT_TOKENS,
            }
            more = {"speculative_config": draft, "disable_log_stats": False}
        engine = self._engine(way, "main", ALL, **more)
        return engine | {"async": way.startswith("async")}


def write_draft(model: Path, folder: Path) -> None:
    """The model without its last layers: a Mixture of Experts too, whose guesses are often wrong."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = DRAFT_LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    dropped = tuple(f"model.layers.{layer}." for layer in range(DRAFT_LAYERS, 100))
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
