"""What `discover` found, as parts of a profile's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from guard.discover.baselines import BaselineRates
from guard.discover.discovery import Discovery
from guard.discover.errors import DiscoverError
from guard.discover.importers import Expert, as_profile_sets
from guard.discover.probe import Probe
from guard.program.topology import Topology

DECIMALS: Final = 6
LEAST_WEIGHT: Final = 1e-4
"""Of a probe; a smaller one moves its logit by less than that."""


@dataclass(frozen=True, slots=True)
class Source:
    """report: the discovery's JSON; versions: by package; licence: "" keeps the profile's own"""

    report: Mapping[str, Any]
    command: str
    versions: Mapping[str, str]
    licence: str = ""


def with_discovery(
    known: Mapping[str, Any] | None,
    name: str,
    found: Discovery,
    probe: Probe,
    baselines: BaselineRates | None,
    source: Source,
) -> dict[str, Any]:
    """A profile with the sets `name`, of experts that the target chooses more often, and `name`-less;
    the probe `name`; baselines and statistics. What it says of other sets stays.

    known: the profile as it is; None: there is none
    baselines: None: the profile's stay

    Raises DiscoverError where it is of another model.
    """
    topology = found.table.topology
    profile = dict(known or {"apiVersion": "moe-guard/v1", "kind": "Profile"})
    profile["model"] = _model(profile.get("model"), topology)
    effect_of = dict(zip(found.table.experts_X, found.effects.effect_X.tolist(), strict=True))
    by_sign = {
        name: [Expert(*expert) for expert in found.experts if effect_of[expert] > 0],
        f"{name}-less": [Expert(*expert) for expert in found.experts if effect_of[expert] < 0],
    }
    new = as_profile_sets(by_sign)
    for key in ("sets", "causal"):
        kept = {other: part for other, part in profile.get(key, {}).items() if other not in by_sign}
        profile[key] = kept | (new if key == "sets" else {})
    if baselines is not None:
        profile["baselines"] = _baselines(baselines)
    profile["probes"] = profile.get("probes", {}) | {name: _probe(found, probe)}
    statistics = {
        other: part for other, part in profile.get("statistics", {}).items() if other not in by_sign
    }
    profile["statistics"] = statistics | {
        own: _statistics(source.report, {(layer, expert) for layer, expert in experts})
        for own, experts in by_sign.items()
        if own == name or experts
    }
    profile["data"] = profile.get("data", {}) | dict(source.report["data"])
    if source.licence:
        profile["licence"] = source.licence
    before = profile.get("provenance")
    profile["provenance"] = (before if isinstance(before, dict) else {}) | {
        "discovery": {
            "command": source.command,
            "versions": dict(source.versions),
            "demands": source.report["demands"],
        }
    }
    return {key: part for key, part in profile.items() if part != {}}


def _model(known: Mapping[str, Any] | None, topology: Topology) -> dict[str, Any]:
    """Sizes that differ from layer to layer are left out: the profile cannot say them."""
    found: dict[str, Any] = {
        "architecture": topology.architecture,
        "layers": len(topology.layers),
    }
    if len({layer.num_experts for layer in topology.layers}) == 1:
        found["experts"] = topology.max_experts
    if len({layer.top_k for layer in topology.layers}) == 1:
        found["topK"] = topology.max_top_k
    if known is None:
        return found
    for key, value in found.items():
        if key in known and known[key] != value:
            raise DiscoverError(
                f"the profile is of another model: its {key} is {known[key]!r}, that of the traces "
                f"{value!r}; give another --profile"
            )
    return {**found, **known}


def _baselines(found: BaselineRates) -> dict[str, Any]:
    rates = {
        str(layer.number): np.round(found.rates_LE[row, : layer.num_experts], DECIMALS).tolist()
        for row, layer in enumerate(found.topology.layers)
    }
    return {"tokens": found.tokens, "rates": rates}


def _probe(found: Discovery, probe: Probe) -> dict[str, Any]:
    by_layer: dict[int, dict[str, float]] = {}
    for (layer, expert), weight in zip(found.table.experts_X, probe.weights_X.tolist(), strict=True):
        if abs(weight) >= LEAST_WEIGHT:
            by_layer.setdefault(layer, {})[str(expert)] = round(weight, 4)
    return {
        "bias": round(probe.bias, 4),
        "weights": [{"layer": layer, "weights": weights} for layer, weights in by_layer.items()],
    }


def _statistics(report: Mapping[str, Any], experts: set[tuple[int, int]]) -> dict[str, Any]:
    prompts, choice = report["prompts"], report["choice"]
    shuffled: Sequence[int] = report["controls"]["flaggedWithLabelsShuffled"]
    rows = [one for one in report["experts"] if (one["layer"], one["expert"]) in experts]
    found: dict[str, Any] = {
        "target": choice["target"],
        "reference": choice["reference"],
        "phase": choice["phase"],
        "pairs": prompts["pairs"],
        "tokens": prompts["tokens"],
        "experts": [{key: value for key, value in row.items() if value is not None} for row in rows],
        "flaggedByChance": round(sum(shuffled) / max(1, len(shuffled)), 4),
    }
    if report["probe"] is not None:
        quality = {
            "inDomain": report["probe"]["aurocInDomain"],
            "heldOut": report["probe"]["aurocOfHeldOutCategory"],
        }
        found["probe"] = {key: value for key, value in quality.items() if value is not None}
    return found
