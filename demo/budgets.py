"""Thresholds by false-positive rate for the policy library's conditions, from benign requests.

The threshold of a budget α is the ⌈(n+1)(1-α)⌉-th smallest of the n requests' furthest values, so
that a fresh request of the same kind is beyond it with probability at most α (split conformal
prediction, Vovk et al. 2005). A condition that was never known in a request cannot fire in it, and
counts as furthest from firing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.layout import Capacity
from guard.device.readback import Readback
from guard.policy import load_policies
from guard.program.compile import compile_policies
from guard.program.topology import Topology
from guard.program.verdict import Routing
from guard.runtime import Guard

BUDGETS: Final = (0.01, 0.05)
DECIMALS: Final = 4
MAX_ROWS: Final = 1024


class Calibrated(NamedTuple):
    """A condition of the library: its words without a threshold, and which way it points."""

    phase: str
    when: Mapping[str, Mapping[str, Any]]
    direction: str = "above"


CONDITIONS: Final = (
    Calibrated("output", {"rate": {"experts": "flagged", "over": 32, "minTokens": 16}}),
    Calibrated("prompt", {"mass": {"experts": "flagged", "over": 16}}),
    Calibrated("output", {"mass": {"experts": "flagged", "over": 32, "minTokens": 16}}),
    Calibrated("any", {"mass": {"experts": "flagged", "over": "request", "minTokens": 32}}),
    Calibrated("any", {"coactivation": {"experts": "flagged", "layers": 3, "over": 16}}),
    Calibrated("any", {"dormant": {"baselineBelow": 0.005, "over": 32}}),
    Calibrated("output", {"suppressed": {"experts": "safety", "over": 32, "minTokens": 16}}),
    Calibrated("any", {"divergence": {"reduce": "max", "over": "request", "minTokens": 32}}),
    Calibrated("any", {"divergence": {"reduce": "mean", "over": "request", "minTokens": 32}}),
    Calibrated("output", {"entropy": {"over": 32, "minTokens": 32}}),
    Calibrated("output", {"concentration": {"over": 32, "minTokens": 32}}),
    Calibrated("prompt", {"probe": {"name": "restricted", "over": "prompt", "minTokens": 8}}),
    Calibrated("output", {"probe": {"name": "restricted", "over": 32, "minTokens": 16}}),
)


def thresholds(
    profile: Mapping[str, Any], topology: Topology, benign: Sequence[Routing]
) -> list[dict[str, Any]]:
    """The `thresholds` of a profile that has all else already."""
    furthest_NC = furthest_values(profile, topology, benign)
    return [
        {
            "phase": condition.phase,
            "when": dict(condition.when),
            "budgets": [
                {"budget": budget, condition.direction: _threshold(values_N, budget, condition)}
                for budget in BUDGETS
            ],
        }
        for condition, values_N in zip(CONDITIONS, furthest_NC.T, strict=True)
    ]


def furthest_values(
    profile: Mapping[str, Any], topology: Topology, requests: Sequence[Routing]
) -> NDArray[np.float64]:
    """[N, C]: each condition's value in each request, the one nearest to firing; NaN: never known."""
    with TemporaryDirectory() as folder:
        Path(folder, "profile.json").write_text(json.dumps(profile), encoding="utf-8")
        Path(folder, "policy.yaml").write_text(json.dumps(_watching()), encoding="utf-8")
        program = compile_policies(load_policies(folder), topology)
    guard = Guard(program, Capacity(MAX_ROWS, max_slots=1), torch.device("cpu"), masking=False)
    return np.stack([_furthest(guard, routing, f"{n}") for n, routing in enumerate(requests)])


def _watching() -> dict[str, Any]:
    """A policy with a rule for each condition; YAML takes JSON."""
    rules = [
        {
            "name": f"condition-{number}",
            "match": {"phase": condition.phase},
            "when": {kind: {**words, condition.direction: 0} for kind, words in condition.when.items()},
        }
        for number, condition in enumerate(CONDITIONS)
    ]
    names = {words["experts"] for c in CONDITIONS for words in c.when.values() if "experts" in words}
    return {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {"name": "watching"},
        "spec": {
            "profile": "profile.json",
            "experts": {name: [{"set": name}] for name in sorted(names)},
            "rules": rules,
        },
    }


def _furthest(guard: Guard, routing: Routing, req_id: str) -> NDArray[np.float64]:
    num_rows = len(routing.topk_ids)
    guard.add_request(req_id, routing.num_prompt_tokens)
    guard.begin_step([req_id], torch.tensor([0, num_rows]), torch.arange(num_rows))
    for layer in range(routing.topk_ids.shape[1]):
        ids, weights = routing.topk_ids[:, layer], routing.topk_weights[:, layer]
        guard.tap.record(layer, torch.from_numpy(ids), torch.from_numpy(weights))
    report = guard.end_step()
    assert isinstance(report, Readback), guard.failures.count
    guard.finish_requests([req_id])
    furthest_C: NDArray[np.float64] = report.result().extremes_BC[0].astype(np.float64)
    return furthest_C


def _threshold(values_N: NDArray[np.float64], budget: float, condition: Calibrated) -> float:
    sign = 1.0 if condition.direction == "above" else -1.0
    ordered = np.sort(np.nan_to_num(values_N * sign, nan=-math.inf))
    rank = math.ceil((len(ordered) + 1) * (1 - budget))
    assert rank <= len(ordered), "too few requests for the budget"
    # Rounded away from firing, so that the budget holds for the number that is written.
    return sign * math.ceil(float(ordered[rank - 1]) * 10**DECIMALS) / 10**DECIMALS
