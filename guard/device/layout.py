"""Sizes and constants of the data plane.

Letters in tensor names, here and in the whole folder:
T rows (tokens) of a step, B requests of a step, S slots, L MoE layers, E experts, K top-k,
X signals, M readings, C conditions, R rules, A mask actions, W mask words, N named sets, V events.
"""

from __future__ import annotations

from dataclasses import dataclass

NULL_SLOT = 0
"""The slot of rows that belong to no request: padding, warm-up, requests that were not admitted."""

MAX_EVENTS_PER_STEP = 512
"""So many of a step's firings are reported with their evidence, enforced masks and blocks first. Of
more there is what counters need, fetched when it is needed; they have no line in the decision log."""

LOAD_EVERY_STEPS = 8
"""In a step of so many, the first one among them, it is counted which experts are chosen."""

MASK_INTERVALS = 4
"""Stretches of positions that an action's mask was in force for, kept to repeat them in a recompute. Of
a mask that is released and fires again more often, the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the buffers are provisioned for; fixed, because a captured graph holds their addresses.

    max_rows: rows of the largest step, padding included
    max_slots: requests that have room for their state from the start, the null slot not among them;
        more of them, as scheduling by priority can leave preempted, make the room grow
    mask_words: 64-bit words of mask actions for each row
    max_draft_tokens: draft tokens of speculative decoding that a request can have in a step
    replay_rows: cached tokens that are evaluated at once; it bounds the memory that a long prefix takes
    """

    max_rows: int
    max_slots: int
    mask_words: int = 1
    max_draft_tokens: int = 0
    replay_rows: int = 2048
