"""A discovery as JSON: everything that its report shows, and what it was computed from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from guard.discover.discovery import Discovery
from guard.discover.probe import Probe
from guard.discover.table import Choice

VERSION = 1


def summary(
    found: Discovery, choice: Choice, probe: Probe | None, data: Mapping[str, str]
) -> dict[str, Any]:
    """`experts` are the flagged ones, those with the largest effect first.

    data: SHA-256 of each trace by its name
    """
    table, effects, controls = found.table, found.effects, found.controls
    column_of = {expert: x for x, expert in enumerate(table.experts_X)}
    topology = table.topology
    return {
        "kind": "Discovery",
        "version": VERSION,
        "verdict": found.verdict,
        "model": {
            "architecture": topology.architecture,
            "layers": [layer.number for layer in topology.layers],
            "experts": topology.max_experts,
            "expertsOfLayer": [layer.num_experts for layer in topology.layers],
            "topK": topology.max_top_k,
        },
        "choice": asdict(choice) | {"phase": choice.phase.value},
        "demands": asdict(found.demands) | {"top": found.demands.top_of(len(found.flagged_X))},
        "prompts": {
            "target": int(table.is_target_N.sum()),
            "reference": int((~table.is_target_N).sum()),
            "pairs": found.num_pairs,
            "tokens": int(table.tokens_N.sum()),
            "categories": dict(Counter(filter(None, table.categories_N))),
            "leftOut": dict(table.left_out),
        },
        "experts": [_expert(found, column_of[expert], expert) for expert in found.experts],
        "countsByEffect": {str(size): count for size, count in found.counts_by_effect.items()},
        "stableByTop": {str(top): count for top, count in found.stability_by_top.items()},
        "controls": {
            "flaggedWithLabelsShuffled": list(controls.shuffled),
            "topicContrasts": controls.topic_contrasts,
            "naiveTokenTest": controls.naive,
            "naiveTokenTestWithLabelsShuffled": controls.naive_shuffled,
            "sameTokenShare": None
            if controls.same_token is None
            else _number(controls.same_token.share),
        },
        "probe": None
        if probe is None
        else {
            "aurocInDomain": probe.quality.in_domain,
            "aurocOfHeldOutCategory": dict(probe.quality.held_out),
        },
        "effects": {
            "rate": _rounded(effects.effect_X),
            "low": _rounded(effects.low_X),
            "high": _rounded(effects.high_X),
        },
        "data": dict(data),
    }


def _expert(found: Discovery, x: int, expert: tuple[int, int]) -> dict[str, Any]:
    effects, topic_X = found.effects, found.controls.topic_effect_X
    same = found.controls.same_token
    odds = effects.log_odds_X[x]
    return {
        "layer": expert[0],
        "expert": expert[1],
        "effect": _number(effects.effect_X[x]),
        "interval": [_number(effects.low_X[x]), _number(effects.high_X[x])],
        "massEffect": None if effects.mass_effect_X is None else _number(effects.mass_effect_X[x]),
        "logOdds": _number(odds.ratio),
        "q": float(f"{effects.q_X[x]:.3g}"),
        "familyP": float(f"{effects.family_p_X[x]:.3g}"),
        "stability": _number(effects.stability_X[x]),
        "topicEffect": None if topic_X is None else _number(topic_X[x]),
        "sameTokenEffect": None if same is None or not same.share else _number(same.effect_X[x]),
    }


def _number(value: float) -> float:
    return round(float(value), 4)


def _rounded(values: Iterable[float]) -> list[float]:
    return [_number(value) for value in values]
