"""Do experts go with the label, or only with the words that its prompts are made of?

Early layers route mostly by token, so rates differ wherever words do. Here both labels are held to the
same tokens: of each token as many positions as the label has that has it less often.

Letters: V distinct tokens, X experts of all layers in a row, S positions that count of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_RATIO = 0.5
"""Of an effect on the same tokens to the whole effect; below it the words make up most of it."""
LEAST_SHARE = 0.1
"""Of the positions; where tokens of both labels cover less, nothing is concluded from them."""


@dataclass(frozen=True, slots=True)
class SameToken:
    """effect_X: sum over tokens v of w_v (r1_v - r2_v) / sum of w_v, with r1_v and r2_v the rates at
        positions of token v under either label, and w_v the lesser number of such positions; NaN where
        no token occurs under both
    share: of the positions, those whose token occurs under both labels
    """

    effect_X: Floats
    share: float

    def ratio(self, effect_X: Floats, flagged_X: NDArray[np.bool_]) -> float | None:
        """The flagged experts' median of this effect by the whole one; None where too few positions
        have a token of both labels, or nothing is flagged."""
        if self.share < LEAST_SHARE or not flagged_X.any():
            return None
        whole_X = effect_X[flagged_X]
        whole_X = np.where(np.abs(whole_X) < 1e-9, 1e-9, whole_X)
        return float(np.median(self.effect_X[flagged_X] / whole_X))

    def warning(self, effect_X: Floats, flagged_X: NDArray[np.bool_]) -> str:
        """A sentence for people; "" where there is nothing to warn of."""
        ratio = self.ratio(effect_X, flagged_X)
        if ratio is None or ratio >= LEAST_RATIO:
            return ""
        return (
            "These experts mostly follow the words, not what is meant by them: on the same tokens the "
            f"labels differ by less than half as much (median ratio {ratio:.2f})."
        )


def coverage(share: float | None) -> str:
    """For people, from a `SameToken.share`; None: the traces hold no token ids."""
    if share is None:
        return (
            "The labels could not be compared on the same tokens: the traces hold no token ids. "
            "`moe-guard record --tokens` keeps them."
        )
    text = f"Tokens that occur under both labels cover {share:.0%} of the positions"
    return f"{text}." if share >= LEAST_SHARE else f"{text}: too few to conclude anything from them."


class SameTokenSum:
    """The effect, added up request by request: it is a sum over positions, each of which counts for
    w_v / n_v, with n_v the number of its own label's positions of that token."""

    def __init__(
        self, tokens: Sequence[NDArray[np.int32]], is_target: Sequence[bool], num_experts: int
    ) -> None:
        """tokens: of each prompt that counts, at the positions that count"""
        token_ids_S = np.concatenate([*tokens, np.zeros(0, np.int32)])
        is_target_S = np.repeat(np.array(is_target, np.bool_), [len(one) for one in tokens])
        self._vocabulary_V, index_S = np.unique(token_ids_S, return_inverse=True)
        size = len(self._vocabulary_V)
        number_2V = np.stack(
            [np.bincount(index_S[is_target_S == side], minlength=size) for side in (False, True)]
        )
        least_V = number_2V.min(axis=0)
        self._total = int(least_V.sum())
        self._weight_2V = least_V / np.maximum(number_2V, 1) / max(1, self._total)
        self._weight_2V[0] *= -1
        shared = int(number_2V[:, least_V > 0].sum())
        self._share = shared / max(1, len(token_ids_S))
        self._effect_X = np.zeros(num_experts)

    def add(
        self,
        token_ids_T: NDArray[np.int32],
        is_target: bool,
        columns: NDArray[np.int64],
        at_work_TLK: NDArray[np.bool_],
    ) -> None:
        """A prompt, at the positions that count. columns: the experts, of all layers in a row, that are
        at work, in their order"""
        weight_T = self._weight_2V[int(is_target), np.searchsorted(self._vocabulary_V, token_ids_T)]
        weights_TLK = np.broadcast_to(weight_T[:, None, None], at_work_TLK.shape)
        weights = weights_TLK[at_work_TLK]
        self._effect_X += np.bincount(columns, weights, minlength=len(self._effect_X))

    def result(self) -> SameToken:
        effect_X = self._effect_X if self._total else np.full_like(self._effect_X, np.nan)
        return SameToken(effect_X, self._share)
