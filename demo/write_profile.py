"""Writes the demo model's profile, `policies/profiles/demo.json`: `python -m demo.write_profile`.

It reads the choosing split and nothing else. The sets and the probe are found as in
`choose_experts`, baselines are means over all benign tokens. A small stand-in for a calibration
command: its thresholds are order statistics of a few hundred prompts (`budgets`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from rich.progress import track

from demo.budgets import thresholds
from demo.choose_experts import (
    NUM_FLAGGED,
    OUTPUT_WINDOW,
    Floats,
    Sample,
    choosing_prompts,
    fit,
    lifted,
)
from demo.routing import MODEL_DIR, Recorder, gates
from demo.text import BENIGN, RESTRICTED
from guard.program.topology import Topology
from guard.program.verdict import Routing

PROFILE: Final = Path(__file__).parent.parent / "policies" / "profiles" / "demo.json"
BENIGN_TOPICS: Final = (*BENIGN, "code")
LEAST_EXPECTED: Final = 0.05
"""Selections a token, over all benign topics."""
DECIMALS: Final = 6

Expert = tuple[int, int]


class Recorded(NamedTuple):
    """One answered prompt of the choosing split."""

    sample: Sample
    routing: Routing


def record(model: Path) -> tuple[Topology, list[Recorded]]:
    recorder = Recorder(model)
    num_experts = recorder.topology.max_experts
    chosen = choosing_prompts()
    runs = recorder.run_all([prompt.text for prompt in chosen])
    return recorder.topology, [
        Recorded(
            Sample(prompt.topic, gates(run.routing, num_experts), run.routing.num_prompt_tokens),
            run.routing,
        )
        for prompt, run in zip(chosen, track(runs, "choosing prompts", len(chosen)), strict=True)
    ]


def baselines(samples: Sequence[Sample]) -> tuple[int, Floats]:
    """Benign tokens, and the mean selections a token of each expert: [L, E]."""
    counts_TLE = np.concatenate([s.counts_TLE for s in samples if s.topic in BENIGN_TOPICS])
    return len(counts_TLE), counts_TLE.mean(0)


def expected(rates_LE: Floats) -> list[Expert]:
    """The experts that benign traffic lives on. They stand in for a safety set, which a model of this
    size does not have."""
    return [(int(layer), int(id_)) for layer, id_ in np.argwhere(rates_LE >= LEAST_EXPECTED)]


def probe(samples: Sequence[Sample]) -> tuple[Floats, float]:
    """A logistic regression of restricted against benign on mean counts: weights [L, E], and bias."""
    rows, labels = [], []
    for sample in samples:
        if sample.topic != RESTRICTED and sample.topic not in BENIGN_TOPICS:
            continue
        for part in (sample.counts_TLE[: sample.num_prompt], sample.counts_TLE[sample.num_prompt :]):
            if len(part) >= OUTPUT_WINDOW:
                rows.append(part.mean(0).ravel())
                labels.append(sample.topic == RESTRICTED)
    shape = samples[0].counts_TLE.shape[1:]
    weights, bias = fit(np.stack(rows), np.array(labels), np.ones(len(rows)), l2=1e-2)
    return np.round(weights, 2).reshape(shape), round(bias, 2)


def entries(experts: Sequence[Expert]) -> list[dict[str, Any]]:
    layers = sorted({layer for layer, _ in experts})
    return [
        {"layer": layer, "experts": sorted(id_ for at, id_ in experts if at == layer)}
        for layer in layers
    ]


def weighted(weights_LE: Floats) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "weights": {str(id_): float(weight) for id_, weight in enumerate(row) if weight},
        }
        for layer, row in enumerate(weights_LE)
        if row.any()
    ]


def profile(topology: Topology, recorded: Sequence[Recorded]) -> dict[str, Any]:
    samples = [one.sample for one in recorded]
    flagged = lifted(samples, RESTRICTED, NUM_FLAGGED, per_layer=5)
    python = lifted(samples, "code", NUM_FLAGGED, per_layer=5)
    tokens, rates_LE = baselines(samples)
    weights_LE, bias = probe(samples)
    first = topology.layers[0]
    content = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {
            "architecture": topology.architecture,
            "layers": len(topology.layers),
            "experts": first.num_experts,
            "topK": first.top_k,
        },
        "provenance": {
            "command": "python -m demo.write_profile",
            "data": "the choosing split of demo/text.py, answered greedily in float32",
            "prompts": len(samples),
        },
        "sets": {
            "flagged": entries(flagged),
            "python": entries(python),
            "safety": entries(expected(rates_LE)),
        },
        "baselines": {
            "tokens": tokens,
            "rates": {
                str(layer.number): [round(float(rate), DECIMALS) for rate in rates_LE[row]]
                for row, layer in enumerate(topology.layers)
            },
        },
        "probes": {"restricted": {"bias": bias, "weights": weighted(weights_LE)}},
    }
    benign = [one.routing for one in recorded if one.sample.topic in BENIGN_TOPICS]
    return content | {"thresholds": thresholds(content, topology, benign)}


def written(content: Mapping[str, Any]) -> str:
    """JSON with a line for each list of numbers, so that changes can be read."""
    return _lines(content, "") + "\n"


def _lines(value: object, indent: str) -> str:
    inner = indent + " "
    match value:
        case dict() if any(isinstance(item, dict | list) for item in value.values()):
            items = [f"{inner}{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent}}}"
        case list() if any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(inner + json.dumps(item) for item in value) + f"\n{indent}]"
        case _:
            return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=PROFILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    topology, recorded = record(options.model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(written(profile(topology, recorded)), encoding="utf-8")


if __name__ == "__main__":
    main()
