"""The policies of these tests, in audit: a request asks for the ones that shall act on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS, TOP_K

FLAGGED = (0, 2, 4, 6, 12, 15)
"""Of each layer, the experts that masks take out; the tiny model chooses each of them often."""

STOP_AT = 80
NEVER_REACHED = 10**9

_FLAGGED_SET = {"flagged": [{"layers": f"0-{NUM_LAYERS - 1}", "experts": list(FLAGGED)}]}


def count(over: str | int, at_least: int, name: str = "flagged") -> dict[str, Any]:
    return {"count": {"experts": name, "over": over, "atLeast": at_least}}


def policy(
    name: str, rules: list[dict[str, Any]], experts: Mapping[str, Any] = _FLAGGED_SET
) -> dict[str, Any]:
    return {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {"name": name},
        "spec": {"mode": "audit", "experts": dict(experts), "rules": rules},
    }


def expert_set(layer: int, expert: int) -> str:
    return f"l{layer}-e{expert}"


_MASK = {"mask": {"experts": "flagged", "method": "reroute", "until": "request-end"}}
_OUTPUT, _PROMPT = {"phase": "output"}, {"phase": "prompt"}

MAIN = [
    policy("isolate", [{"name": "mask", "when": {"always": {}}, "then": _MASK}]),
    policy(
        "late",
        [{"name": "mask", "match": _OUTPUT, "when": count("output", 60), "then": _MASK}],
    ),
    policy(
        "stop",
        [
            {
                "name": "block",
                "match": _OUTPUT,
                "when": count("output", STOP_AT),
                "then": {"block": {}},
            }
        ],
    ),
    policy(
        "stop-prompt",
        [{"name": "block", "match": _PROMPT, "when": count("request", 20), "then": {"block": {}}}],
    ),
    policy("closed", [{"name": "never", "when": count("request", NEVER_REACHED)}]),
    policy(
        "watch",
        [
            {"name": "used", "when": count("request", 1)},
            {"name": "used-now", "match": _OUTPUT, "when": count("token", 1)},
            {"name": "many", "when": count("request", 600)},
            {"name": "burst", "when": {"rate": {"experts": "flagged", "over": 8, "above": 0.42}}},
        ],
    ),
    policy(
        "spread",
        [
            {"name": "drift", "when": {"divergence": {"over": 8, "minTokens": 2, "above": 0.2}}},
            {
                "name": "drift-of-prompt",
                "when": {"divergence": {"over": "prompt", "reduce": "mean", "above": 0.0}},
            },
            {"name": "narrow", "when": {"entropy": {"over": 6, "minTokens": 1, "below": 6.0}}},
            {
                "name": "narrow-output",
                "when": {"entropy": {"over": "output", "below": 8.0}},
            },
            {"name": "load", "when": {"concentration": {"over": 8, "above": 0.7}}},
            {
                "name": "together",
                "when": {"coactivation": {"experts": "flagged", "layers": 4, "over": 5, "atLeast": 2}},
            },
        ],
    ),
    policy(
        "every-expert",
        [{"name": "never", "when": count("request", NEVER_REACHED, expert_set(0, 0))}],
        {
            expert_set(layer, expert): [{"layer": layer, "experts": [expert]}]
            for layer in range(NUM_LAYERS)
            for expert in range(NUM_EXPERTS)
        },
    ),
]

next(p for p in MAIN if p["metadata"]["name"] == "closed")["spec"]["onError"] = "closed"
next(p for p in MAIN if p["metadata"]["name"] == "spread")["spec"]["profile"] = "../profile.json"

PROFILE = {
    "apiVersion": "moe-guard/v1",
    "kind": "Profile",
    "model": {
        "architecture": "Qwen3MoeForCausalLM",
        "layers": NUM_LAYERS,
        "experts": NUM_EXPERTS,
        "topK": TOP_K,
    },
    "baselines": {
        "tokens": 1000,
        "rates": {
            str(layer): [round((1 + expert) * TOP_K / 136, 6) for expert in range(NUM_EXPERTS)]
            for layer in range(NUM_LAYERS)
        },
    },
}
"""More of the experts with a high id: a model with random weights is unlike it."""

NEVER_FIRES = [
    policy(
        "never",
        [
            {"name": "mask", "when": count("request", NEVER_REACHED), "then": _MASK},
            {"name": "block", "when": count("request", NEVER_REACHED), "then": {"block": {}}},
        ],
    )
]
for _never in NEVER_FIRES:
    _never["spec"]["mode"] = "enforce"


def _enforcing(name: str) -> list[dict[str, Any]]:
    """`MAIN` with one policy enforced."""
    made = json.loads(json.dumps(MAIN))
    next(p for p in made if p["metadata"]["name"] == name)["spec"]["mode"] = "enforce"
    return list(made)


ISOLATING = _enforcing("isolate")

OUT_OF_RANGE = [
    policy(
        "range",
        [{"name": "r", "when": count("request", 1)}],
        {"flagged": [{"layer": 0, "experts": [NUM_EXPERTS]}]},
    )
]


_RED = {"labels": {"tenant": "red"}}
_BLUE = {"labels": {"tenant": ["blue", "green"]}}
_EVERY_SET = {"every": [{"layers": f"0-{NUM_LAYERS - 1}", "experts": list(range(NUM_EXPERTS))}]}
SAMPLES = {"tenth": 0.1, "half": 0.5, "all": 1.0}

LABELLED = [
    policy("mask-but-red", [{"name": "mask", "when": {"always": {}}, "then": _MASK}]),
    policy(
        "stop-blue",
        [
            {
                "name": "block",
                "match": _OUTPUT | _BLUE,
                "when": count("output", 1, "every"),
                "then": {"block": {}},
            }
        ],
        _EVERY_SET,
    ),
    policy(
        "sampled",
        [
            {"name": name, "match": {"sample": share}, "when": {"always": {}}}
            for name, share in SAMPLES.items()
        ],
    ),
]
LABELLED[0]["spec"] |= {"mode": "enforce", "exceptions": [{"name": "red-team", "match": _RED}]}
LABELLED[1]["spec"]["mode"] = "enforce"

CLOSED = policy("closed", [{"name": "never", "when": count("request", NEVER_REACHED)}])
CLOSED["spec"]["onError"] = "closed"


def _masking(method: str, on_error: str) -> dict[str, Any]:
    """Of a layer at most the k that it chooses can be forced."""
    mask = {"mask": {"experts": "flagged", "method": method.replace("-", "_")}}
    name = method if on_error == "open" else f"{method}-{on_error}"
    experts = [0, 2] if method == "force" else list(FLAGGED)
    sets = {"flagged": [{"layers": f"0-{NUM_LAYERS - 1}", "experts": experts}]}
    made = policy(name, [{"name": "mask", "when": {"always": {}}, "then": mask}], sets)
    made["spec"]["onError"] = on_error
    return made


FAULTS = [
    CLOSED,
    *(
        _masking(method, on_error)
        for method in ("reroute", "drop", "drop-renorm", "force")
        for on_error in ("open", "closed")
    ),
]


def write(folder: Path, policies: list[dict[str, Any]]) -> Path:
    """JSON is YAML."""
    folder.mkdir()
    for one in policies:
        path = folder / f"{one['metadata']['name']}.yaml"
        path.write_text(json.dumps(one, indent=1), encoding="utf-8")
    return folder
