"""The requests of these tests. Compared runs have the same batches: kernels may round differently
in another composition of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tests.support.tiny_models import VOCABULARY

Request = dict[str, Any]
Case = dict[str, Any]

BLOCK_SIZE = 32
BATCH = 16
MASKED = range(1, BATCH, 2)
"""The requests of the batch that ask for the mask."""

SHARED_TOKENS = 112
CACHED_TOKENS = SHARED_TOKENS // BLOCK_SIZE * BLOCK_SIZE


def tokens(seed: int, length: int) -> list[int]:
    return Random(seed).choices(range(2, VOCABULARY), k=length)


def request(
    prompt: list[int], *, enforce: Sequence[str] = (), tenant: str | None = None, **sampling: Any
) -> Request:
    settings = {"temperature": 0.0, "ignore_eos": True, "logprobs": 1} | sampling
    extra_args: dict[str, Any] = {}
    if enforce:
        extra_args["moe_guard_enforce"] = list(enforce)
    if tenant is not None:
        extra_args["moe_guard_labels"] = {"tenant": tenant}
    if extra_args:
        settings["extra_args"] = extra_args
    return {"prompt": prompt, "sampling": settings}


def continuing(batch: int, number: int, **sampling: Any) -> Request:
    """Its prompt is the whole text of an earlier request of the same case."""
    return request([], **sampling) | {"continues": [batch, number]}


def case(name: str, *batches: list[Request]) -> Case:
    return {"name": name, "batches": list(batches)}


def batch_of_16(enforce: Sequence[str] = ()) -> list[Request]:
    """Greedy ones and sampled ones; `enforce` is what those of `MASKED` ask for."""
    return [
        request(
            tokens(i, 32 + i),
            max_tokens=16,
            enforce=enforce if i in MASKED else (),
            temperature=0.0 if i % 4 < 2 else 1.0,
            seed=i,
        )
        for i in range(BATCH)
    ]


def mask_midway(enforce: Sequence[str] = ()) -> Case:
    """Two requests, then their texts as prompts, which find blocks of theirs in the cache."""
    own: dict[str, Any] = {"temperature": 1.0, "max_tokens": 30, "enforce": enforce}
    return case(
        "midway",
        [request(tokens(100 + i, 40), seed=i, **own) for i in range(2)],
        [continuing(0, 0, max_tokens=1)],
        [continuing(0, 1, max_tokens=1)],
    )


BLOCK_VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "min_tokens": {"min_tokens": 24},
    "logprobs": {"logprobs": 3, "temperature": 1.0, "seed": 5},
    "n": {"n": 2, "temperature": 1.0, "seed": 7},
}


def blocks(enforce: Sequence[str] = ()) -> Case:
    """Each alone in its batch: whoever is blocked leaves the batch, which must change nothing."""
    return case(
        "blocks",
        *(
            [request(tokens(200 + i, 24), max_tokens=24, enforce=enforce, **variant)]
            for i, variant in enumerate(BLOCK_VARIANTS.values())
        ),
    )


ENFORCED_FROM, ENFORCED_UNTIL = 4, 12
"""Steps before which the policies of `reloads` change, and change back."""


def reloads(enforced: str, before: str) -> Case:
    """Two requests under way while the folder of policies is `enforced` and then again `before`."""
    requests = [request(tokens(700 + i, 12), max_tokens=20) for i in range(2)]
    changes = {str(ENFORCED_FROM): enforced, str(ENFORCED_UNTIL): before}
    return case("reloads", requests) | {"stepped": True, "policies": changes}


def _shared(own: int, enforce: Sequence[str] = ()) -> list[Request]:
    prompt = tokens(300, SHARED_TOKENS) + tokens(own, 8)
    return [request(prompt, max_tokens=2, enforce=enforce)]


PREFIX = case(
    "prefix",
    _shared(301),
    _shared(302),
    _shared(303, ["isolate"]),
    _shared(304, ["isolate"]),
    _shared(305),
)
PREFIX_CLOSED = case("prefix-closed", _shared(301), _shared(306, ["closed"]))


def _chain(enforce: Sequence[str] = ()) -> list[Request]:
    """Prompts of one step: the second goes on from the first one's blocks, the third from its."""
    first = tokens(300, SHARED_TOKENS)
    second = first[:CACHED_TOKENS] + tokens(307, 70)
    return [
        request(prompt, max_tokens=6, enforce=enforce)
        for prompt in (first, second, second[: 5 * BLOCK_SIZE] + tokens(308, 40))
    ]


PREFIX_IN_STEP = case("prefix-in-step", _chain(), _chain(["stop-prompt"]))


def alone(shared: Case) -> Case:
    """The same requests, none of which finds anything in the cache."""
    batches = [
        [one | {"salt": f"{number}-{i}"} for i, one in enumerate(batch)]
        for number, batch in enumerate(shared["batches"])
    ]
    return case(f"{shared['name']}-alone", *batches)


PREFIX_MASKED_FIRST = case("prefix-masked-first", _shared(301, ["isolate"]), _shared(302))

_LABELLED_PROMPT = tokens(700, SHARED_TOKENS)

LABELLED = case(
    "labelled",
    *(
        [request(_LABELLED_PROMPT, max_tokens=24, tenant=tenant, enforce=enforce)]
        for tenant, enforce in (
            ("red", ()),
            (None, ()),
            ("red", ()),
            ("red", ("mask-but-red",)),
            ("blue", ()),
        )
    ),
    [request(tokens(710 + i, 4), max_tokens=1, tenant="red") for i in range(BATCH)],
)
"""The same text by a tenant that is exempt from the mask, and by others; then some short ones."""

LONG_PROMPTS = case(
    "long",
    *(
        [request(tokens(400 + i, 150), max_tokens=12, enforce=enforce)]
        for i, enforce in enumerate((["isolate"], ["late"], ["stop-prompt"]))
    ),
)

_CHUNKED_TOKENS = 24

EVERY_CHUNK = case(
    "every-chunk",
    *(
        [request(tokens(450, _CHUNKED_TOKENS), max_tokens=3) | {"salt": f"{chunk_tokens}"}]
        for chunk_tokens in range(1, _CHUNKED_TOKENS + 1)
    ),
) | {"chunk_tokens": list(range(1, _CHUNKED_TOKENS + 1))}
"""The same prompt in chunks of each size, from 1 to the whole. The last case of an engine."""

CROWD = case(
    "crowd",
    [
        request(tokens(500 + i, 60), max_tokens=12, enforce=["isolate"] if i % 2 else [])
        for i in range(8)
    ],
)
"""More than `CROWDED_BLOCKS` blocks hold: some are preempted and computed again."""
CROWDED_BLOCKS = 20

FAULT_ON_RANK_1 = case(
    "fault",
    [request(tokens(600 + i, 20), max_tokens=6) for i in range(2)],
    [request(tokens(610, 20), max_tokens=6)],
) | {"before_batch": [None, ["fail_next_evaluation", 1]]}
"""Two requests that are judged, then one whose first step rank 1 cannot judge."""


FAULT_LAYER = 3
"""The last one: a gate weight that is NaN there reaches no KV."""
FIRST_STAGE_FAULT_LAYER = 1
"""The last one of the first of two ranks of a pipeline."""


def routing_fault(
    kind: str,
    enforce: Sequence[str],
    layer: int = FAULT_LAYER,
    rank: int | None = None,
    max_tokens: int = 40,
) -> Case:
    """Behind a sound batch a faulty one, and a sound one again; each runs for longer than the running
    check leaves out steps. rank: the only one with the fault; all if none is given"""

    def batch(number: int) -> list[Request]:
        return [
            request(
                tokens(900 + 10 * number + i, 20), max_tokens=max_tokens, enforce=[name] if name else []
            )
            for i, name in enumerate(enforce)
        ]

    calls = [None, ["set_routing_fault", kind, [layer], rank], ["clear_routing_faults"]]
    name = "-".join([kind, *(name for name in enforce if name)])
    return case(name, *map(batch, range(3))) | {"before_batch": calls}


RANKED_FAULTS = ("silent", "reports_not_finite", "duplicate")
RANKED_TOKENS = 16


def routing_faults_of_rank(rank: int, layer: int) -> list[Case]:
    """Of one rank of several."""
    faults = [(kind, ["", "closed"]) for kind in RANKED_FAULTS]
    faults.append(("ignores_masks", ["reroute", "reroute-closed"]))
    return [routing_fault(kind, names, layer, rank, RANKED_TOKENS) for kind, names in faults]


KERNEL_FAULTS = [
    routing_fault("uncalled", ["", "closed"], max_tokens=20),
    routing_fault("ignores_masks", ["", "isolate"], max_tokens=20),
]
"""Of a kernel that routes inside itself, with policies of `policies.MAIN`."""

STAGES_IN_A_STEP = {
    "admit": "admit@1,admit@2",  # of each request of the batch
    "begin_step": "begin_step@1",
    "evaluate": "evaluate@1",
    "readback": "readback@1",
    "ledger": "ledger@4",  # where the step's report is entered, behind what is noted of KV blocks
}
STAGES_BEHIND_IT = {
    "deliver": "deliver@1",
    "metrics": "metrics@1",
    "decision_log": "decision_log@1",
    "event_buffer": "event_buffer@1",
}
LASTING_FAULTS = {
    "rows unknown": "begin_step@*",
    "never judged": "evaluate@*",
    "never read": "readback@*",
    "no ledger": "ledger@*",
    "all of it": ",".join(f"{stage}@*" for stage in STAGES_IN_A_STEP),
}
LOST_BEHIND_IT = {
    "never delivered": "deliver@*",
    "never counted": "metrics@*",
    "message lost": "message@1",
    "no log": "decision_log@*",
}
STAGE_FAULT_TOKENS = 4


def stage_faults() -> list[Case]:
    """Of each drill a batch that meets its faults, and one behind it; an open and a closed request in
    each."""

    def batch(number: int) -> list[Request]:
        return [
            request(tokens(950 + 10 * number + i, 20), max_tokens=STAGE_FAULT_TOKENS, enforce=enforce)
            for i, enforce in enumerate(([], ["closed"]))
        ]

    drills = STAGES_IN_A_STEP | STAGES_BEHIND_IT | LASTING_FAULTS | LOST_BEHIND_IT
    return [
        case(name, batch(0), batch(1)) | {"before_batch": [["inject_faults", faults], ["end_drill"]]}
        for name, faults in drills.items()
    ]


def routing_faults() -> list[Case]:
    """Those that pass come first: a mask that was not obeyed leaves the guard down."""
    kinds = ("silent", "out_of_range", "not_finite", "duplicate")
    unjudged = [routing_fault(kind, ["", "closed"]) for kind in kinds]
    methods = [
        routing_fault("ignores_masks", [method, f"{method}-closed"])
        for method in ("reroute", "drop", "drop-renorm", "force")
    ]
    return unjudged + methods
