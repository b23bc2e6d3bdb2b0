"""Requests from their first step to their last: many through few slots, some cancelled on the way, some
preempted by more urgent ones. And the engines that serve them, with room for few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.integration.offline import cases, policies
from tests.integration.offline.cases import Case, Request
from tests.integration.offline.engines import Engines
from tests.integration.offline.policies import FLAGGED, count, policy
from tests.integration.serving.engines import NGRAM
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny_models import NUM_LAYERS, write_tiny_moe

SEQUENCES = 4
REQUESTS = 10 * 2 * SEQUENCES + 4
"""More than ten for each slot of the guard's, which are two for each sequence that can run."""

KV_BLOCKS = 9
"""Of 32 tokens, one of them vLLM's own: four requests of three blocks are more than they hold."""

BATCHED_TOKENS = 24
MAX_LENGTH = 192

BEAMS = {"watching": "watch", "armed": "empty", "off": None}
"""Engines in which beam search is tried, and their policies: one that only observes, none, no guard."""

RUNNERS = {"lives": ("steady", "async", *BEAMS, "ngram"), "v2-lives": ("async", "async-ngram")}
"""Groups of engines: V1 and V2. async: a step is under way while the next one is scheduled. The one
with drafts is the last: vLLM's CPU build starts no engine in a process that ran its n-gram proposer."""

WAYS = [(group, way) for group, ways in RUNNERS.items() for way in ways]

_LAYERS = f"0-{NUM_LAYERS - 1}"
_OUTPUT = {"phase": "output"}


def _mask(until: str | int = "request-end") -> dict[str, Any]:
    return {"mask": {"experts": "flagged", "until": until}}


def _watched(layer: int) -> str:
    return f"layer-{layer}"


POLICIES = [
    policy("isolate", [{"name": "always", "when": {"always": {}}, "then": _mask()}]),
    policy("late", [{"name": "late", "match": _OUTPUT, "when": count("output", 20), "then": _mask()}]),
    policy(
        "flicker",
        [{"name": "flicker", "match": _OUTPUT, "when": count("token", 6), "then": _mask("clear")}],
    ),
    policy(
        "brief",
        [
            {
                "name": "brief",
                "match": _OUTPUT,
                "when": count(2, 11),
                "persist": {"hits": 2, "of": 3},
                "then": _mask(3),
            }
        ],
    ),
    policy(
        "stop",
        [{"name": "stop", "match": _OUTPUT, "when": count("output", 36), "then": {"block": {}}}],
    ),
    policy(
        "stop-prompt",
        [
            {
                "name": "stop-prompt",
                "match": {"phase": "prompt"},
                "when": count("request", 60),
                "then": {"block": {}},
            }
        ],
    ),
    policy(
        "watch",
        [
            *({"name": f"many-{n}", "when": count("request", n)} for n in (40, 80, 120, 200, 280)),
            {"name": "now", "when": count("token", 8)},
            {"name": "lasting", "when": count("token", 7), "persist": {"hits": 3, "of": 5}},
            {"name": "burst", "when": {"rate": {"experts": "flagged", "over": 8, "above": 0.42}}},
            {"name": "mass", "when": {"mass": {"experts": "flagged", "over": 5, "above": 0.45}}},
            {"name": "output", "match": _OUTPUT, "when": {"not": count("output", 25)}},
        ],
    ),
    policy(
        "layers",
        [{"name": "never", "when": count("request", policies.NEVER_REACHED, _watched(0))}],
        {_watched(layer): [{"layer": layer, "experts": list(FLAGGED)}] for layer in range(NUM_LAYERS)},
    ),
]

ASKED: list[list[str]] = [
    [],
    ["isolate"],
    ["late"],
    ["stop"],
    ["flicker"],
    [],
    ["brief", "stop"],
    ["stop-prompt"],
]


def life(number: int, **more: Any) -> Request:
    """One of the requests; the same number is the same request wherever it runs. None is sampled with a
    seed: with a prompt in chunks and async scheduling, vLLM's V1 cannot do that on a CPU."""
    made = cases.request(
        cases.tokens(2000 + number, 20 + 7 * number % 45),
        max_tokens=6 + number % 9,
        enforce=ASKED[number % len(ASKED)],
    )
    return made | more


def stepped(name: str, *batches: Sequence[Request]) -> Case:
    return cases.case(name, *map(list, batches)) | {"stepped": True}


def reused() -> Case:
    """All at once: as many as there is room for run, and each that ends makes room for another."""
    return stepped("reused", [life(i) for i in range(REQUESTS)])


def backwards() -> Case:
    """The same in the opposite order: each finds what other requests left behind."""
    return stepped("backwards", [life(i) for i in reversed(range(REQUESTS))])


def short_lives() -> Case:
    """As many, but of few tokens: V2 is slow on a CPU."""
    short = [life(i) for i in range(REQUESTS)]
    for i, request in enumerate(short):
        request["prompt"] = request["prompt"][: 6 + i % 7]
        request["sampling"]["max_tokens"] = 1 + i % 4
    return stepped("short", short)


def urgent() -> Case:
    """Each alone, and then all: later ones are more urgent than those that they find under way, and
    there is not room for all."""
    asked = [[], ["isolate"], ["late"], ["flicker"], ["brief"], ["stop"]]
    requests = [
        cases.request(cases.tokens(5000 + i, 52 + i % 11), max_tokens=16, enforce=asked[i % len(asked)])
        for i in range(12)
    ]
    together = [request | {"priority": -i, "arrives": 5 * i // 2} for i, request in enumerate(requests)]
    return stepped("urgent", *[[request] for request in requests], together)


GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[ -~]{24}(ab|cd)"},
    {"choice": ["red red red red red", "green green green", "blue blue blue blue"]},
    {
        "json": {
            "type": "object",
            "properties": {
                "ok": {"type": "boolean"},
                "kind": {"enum": ["first", "second"]},
                "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
            },
            "required": ["ok", "kind", "list"],
            "additionalProperties": False,
        }
    },
]

STRUCTURED_ASKED: list[list[str]] = [[], ["isolate"], ["stop"], ["late"]]


def structured() -> Case:
    """Each grammar with each of `STRUCTURED_ASKED`."""
    return stepped(
        "structured",
        [
            cases.request(
                cases.tokens(4000 + i, 20),
                max_tokens=90,
                enforce=enforce,
                ignore_eos=False,
                structured_outputs=grammar,
            )
            for i, grammar in enumerate(GRAMMARS)
            for enforce in STRUCTURED_ASKED
        ],
    )


def prompt_only() -> Case:
    """One token each, of which none but the prompt is judged; with the prompt's log probabilities."""
    asked = [[], ["stop-prompt"], ["isolate"], ["late"], ["stop"], ["stop-prompt"]]
    return stepped(
        "prompt-only",
        [
            cases.request(
                cases.tokens(6000 + i, 30 + 5 * i), max_tokens=1, enforce=enforce, prompt_logprobs=1
            )
            for i, enforce in enumerate(asked)
        ],
    )


CHILDREN = 4


def children() -> Case:
    """Several samples of one prompt: left alone, and with a block that meets some of them. A prompt so
    short that the samples' prompts are of one step: see `life`."""
    own: dict[str, Any] = {"n": CHILDREN, "temperature": 1.0, "seed": 11, "max_tokens": 8}
    prompt = cases.tokens(7000, BATCHED_TOKENS // CHILDREN)
    return cases.case(
        "children", [cases.request(prompt, **own)], [cases.request(prompt, enforce=["stop"], **own)]
    )


def one_by_one() -> Case:
    return stepped("one-by-one", *[[life(i)] for i in range(REQUESTS)])


CANCELLED: dict[int, dict[str, Any]] = {
    1: {"at_decision": [0, 1, "stop"]},
    2: {"at_decision": [0, 2, "late"]},
    3: {"in": "preempted"},
    4: {"in": "prompt"},
    5: {"in": "output", "tokens": 4},
    9: {"in": "waiting"},
    10: {"in": "output", "tokens": 2},
}
"""By their place in `cancelled`."""


def cancelled() -> Case:
    """A batch of which all run to their ends, and the same again with some cancelled on the way."""
    asked = [[], ["stop"], ["late"], ["isolate"], [], ["isolate"], ["late"], ["stop"], []]
    asked += [["isolate"], ["flicker"], ["brief"]]
    whole = [
        cases.request(cases.tokens(3000 + i, 54 + i % 7), max_tokens=14, enforce=enforce)
        | {"arrives": 4}
        for i, enforce in enumerate(asked)
    ]
    for i, priority in ((3, 9), (8, 8)):  # under way before the others, and less urgent
        whole[i] |= {"arrives": 0, "priority": priority}
    ended = [
        request | ({"cancel": CANCELLED[i]} if i in CANCELLED else {})
        for i, request in enumerate(whole)
    ]
    return stepped("cancelled", whole, ended)


class LifeEngines(Engines):
    """The groups are those of `RUNNERS`."""

    def _engines(self, group: str) -> list[dict[str, Any]]:
        return [
            self._engine(way, BEAMS[way], [], skip_tokenizer_init=False) | {"beam_search": True}
            if way in BEAMS
            else self._way(group, way)
            for way in RUNNERS[group]
        ]

    def _way(self, group: str, way: str) -> dict[str, Any]:
        small = {
            "max_model_len": MAX_LENGTH,
            "max_num_seqs": SEQUENCES,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "num_gpu_blocks_override": KV_BLOCKS,
            "scheduling_policy": "priority",
            "skip_tokenizer_init": False,
            "disable_log_stats": False,
            "worker_extension_cls": "tests.support.routing_recorder.WeightsRecorder",
        }
        more: dict[str, Any] = {"speculative_config": NGRAM} if "ngram" in way else {}
        more["structured_outputs_config"] = (
            {"backend": "outlines"}
            if way == "async"
            else {"backend": "xgrammar", "disable_any_whitespace": True}
        )
        engine = self._engine(way, "lives", cases_of(group, way), **small, **more)
        return engine | {"async": way.startswith("async"), "record": True}


def cases_of(group: str, way: str) -> list[Case]:
    if "ngram" in way:
        return [structured()]
    if group == "v2-lives":
        return [short_lives(), cancelled()]
    if way == "async":
        return [backwards(), cancelled(), urgent(), structured(), prompt_only()]
    if way in BEAMS:
        return []
    more = [children()] if way == "steady" else []
    return [reused(), one_by_one(), cancelled(), urgent(), structured(), prompt_only(), *more]


def write_lives(folder: Path) -> None:
    write_tiny_moe(folder / "moe")
    write_byte_tokenizer(folder / "moe")
    policies.write(folder / "lives", POLICIES)
    policies.write(folder / "watch", [p for p in POLICIES if p["metadata"]["name"] == "watch"])
    policies.write(folder / "empty", [])
