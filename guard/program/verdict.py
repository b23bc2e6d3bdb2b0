"""What an evaluation of one request says, whoever computed it: the reference or the device."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

CLOSE: Final = 1e-12
"""Values with logarithms or sums of quotients in them (suppressed, divergence, entropy, concentration)
are computed in float64, in whatever order. Such a value meets a threshold that is at most this far off,
times the threshold where that is above 1: then `atLeast` and `atMost` hold, `above` and `below` do not.
Rounding errors are far smaller, so a value that meets its threshold on paper does so everywhere. All
other values are compared exactly."""


class Routing(NamedTuple):
    """The routing of one request, as chosen after all masks. L as in the topology, K its largest top-k.

    topk_ids: int32 [positions, L, K], logical; -1 where a layer chose fewer than K experts
    topk_weights: float32 [positions, L, K], after renormalisation, before routed scaling
    num_prompt_tokens: P; positions 0..P-1 are the prompt
    first_seen: positions below it were not routed here (a cached prefix); their rows are ignored
    unseen: other positions that were not seen, or of which no evidence was kept
    """

    topk_ids: NDArray[np.int32]
    topk_weights: NDArray[np.float32]
    num_prompt_tokens: int
    first_seen: int = 0
    unseen: frozenset[int] = frozenset()

    def is_seen(self, position: int) -> bool:
        return position >= self.first_seen and position not in self.unseen


class Evidence(NamedTuple):
    """A condition's number at the moment its rule fired; value is NaN where it was unknown."""

    condition: str  # Condition.label
    value: float
    threshold: float


class Firing(NamedTuple):
    """A rule's result turned true at a position."""

    position: int
    policy: str
    rule: str
    evidence: tuple[Evidence, ...]
    exempt: bool = False  # an exception withheld the action


class MaskInterval(NamedTuple):
    """Positions start <= p < stop are routed under the rule's mask; stop is None while it holds."""

    policy: str
    rule: str
    start: int
    stop: int | None


class BlockedAt(NamedTuple):
    """The token sampled at `position` was withheld and the request ended."""

    position: int
    policy: str
    rule: str


class Verdict(NamedTuple):
    """All that follows from one request's routing.

    firings: by position, then deciding order; none behind the block
    masks: of enforced mask rules, by start, then deciding order
    """

    firings: tuple[Firing, ...]
    masks: tuple[MaskInterval, ...]
    blocked: BlockedAt | None
