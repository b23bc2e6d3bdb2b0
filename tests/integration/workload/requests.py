"""200 requests of a mixed workload, and the policies that they are judged by.

Prompts share prefixes; half of the requests ask for a mask from the start, some for one that comes on
in the middle, some for a block; every tenth is cancelled by its client. Nothing is random: the same
number is the same request wherever it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS, VOCABULARY

NUM_REQUESTS = 200
BLOCK_SIZE = 32
MAX_OUTPUT_TOKENS = 20
FLAGGED = (0, 2, 4, 6, 12, 15)
WATCHED = (1, 3, 5, 7)
LADDER = (20, 60, 120, 200, 300)
"""Selections of the watched experts at which a rule of its own fires."""

_NUM_PREFIXES = 6


@dataclass(frozen=True)
class WorkRequest:
    """number: also its seed; enforce: the policies that it asks to have enforced."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    enforce: tuple[str, ...]
    is_cancelled: bool

    def body(self) -> dict[str, Any]:
        """Of a completion request."""
        xargs = {"vllm_xargs": {"moe_guard_enforce": list(self.enforce)}} if self.enforce else {}
        return {
            "model": "tiny",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.number,
            "extra_body": {
                "ignore_eos": True,
                "return_token_ids": True,
                "request_id": f"work-{self.number}-",
                **xargs,
            },
        }


def work_requests() -> list[WorkRequest]:
    return [_request(number) for number in range(NUM_REQUESTS)]


def _request(number: int) -> WorkRequest:
    random = Random(number)
    prefix = Random(1000 + number % _NUM_PREFIXES).choices(range(2, VOCABULARY), k=2 * BLOCK_SIZE)
    kept = random.choice((0, BLOCK_SIZE, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE))
    own = random.choices(range(2, VOCABULARY), k=random.randint(3, 30))
    asked = ["isolate"] if number % 2 else []
    if number % 7 == 3:
        asked = ["late"]
    if number % 11 == 5:
        asked.append("stop")
    return WorkRequest(
        number,
        tuple(prefix[:kept] + own),
        max_tokens=random.randint(4, MAX_OUTPUT_TOKENS),
        temperature=random.choice((0.0, 0.0, 1.0)),
        enforce=tuple(asked),
        is_cancelled=number % 10 == 9,
    )


def policies() -> list[dict[str, Any]]:
    """In audit: a request asks for those that shall act on it."""
    mask = {"mask": {"experts": "flagged"}}
    output = {"phase": "output"}
    return [
        _policy("isolate", [{"name": "mask", "when": {"always": {}}, "then": mask}]),
        _policy(
            "late",
            [{"name": "mask", "match": output, "when": _count("output", 30), "then": mask}],
        ),
        _policy(
            "stop",
            [{"name": "block", "match": output, "when": _count("output", 60), "then": {"block": {}}}],
        ),
        _policy(
            "ladder",
            [{"name": f"at-{n}", "when": _count("request", n, "watched")} for n in LADDER]
            + [
                {"name": "token", "when": _count("token", 5, "watched")},
                {"name": "recent", "when": {"rate": _over(16, above=0.3)}},
                {"name": "prompt-rate", "when": {"rate": _over("prompt", above=0.25)}},
                {"name": "mass", "when": {"mass": _over("request", above=0.26) | {"minTokens": 8}}},
                {
                    "name": "lasting",
                    "when": _count("token", 4, "watched"),
                    "persist": {"hits": 3, "of": 5},
                },
            ],
        ),
    ]


def _policy(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    layers = f"0-{NUM_LAYERS - 1}"
    assert max(*FLAGGED, *WATCHED) < NUM_EXPERTS
    return {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {"name": name},
        "spec": {
            "mode": "audit",
            "experts": {
                "flagged": [{"layers": layers, "experts": list(FLAGGED)}],
                "watched": [{"layers": layers, "experts": list(WATCHED)}],
            },
            "rules": rules,
        },
    }


def _count(over: str, at_least: int, name: str = "flagged") -> dict[str, Any]:
    return {"count": {"experts": name, "over": over, "atLeast": at_least}}


def _over(window: str | int, above: float) -> dict[str, Any]:
    return {"experts": "watched", "over": window, "above": above}
