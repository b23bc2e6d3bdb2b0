"""Which experts go with a label, how surely, and how much of that chance or topic would show as well.

Letters: P pairs of prompts, X experts of all layers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.discover.effects import (
    Floats,
    LogOdds,
    SignFlips,
    benjamini_hochberg,
    log_odds,
    naive_token_q,
    stability,
    studentized,
)
from guard.discover.errors import DiscoverError
from guard.discover.same_token import SameToken
from guard.discover.table import PromptTable

Bools = NDArray[np.bool_]

LEAST_PAIRS = 8
"""Below it no sign flips are rare enough to conclude anything."""

EFFECT_SIZES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""At which the number of experts is reported."""

LEAST_OF_CATEGORY = 5
"""Prompts; smaller categories are in no topic contrast."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What an expert must show to be flagged.

    q: the false discovery rate, by Benjamini and Hochberg
    least_effect: of the mean difference of activation rates, either way
    least_stability: the share of resamples in which it is among the `top`; None: 1 % of all experts,
        and 10 at least
    flips, resamples, shuffles: of the randomisation test, of stability, and of labels shuffled within
        pairs
    """

    q: float = 0.05
    least_effect: float = 0.1
    least_stability: float = 0.9
    top: int | None = None
    flips: int = 1000
    resamples: int = 100
    shuffles: int = 20
    seed: int = 0

    def top_of(self, num_experts: int) -> int:
        return self.top or max(10, -(-num_experts // 100))


class Effects(NamedTuple):
    """Of each expert. effect_X: mean over pairs of the difference of activation rates, with its 95 %
    bootstrap interval; mass_effect_X: the same of gate weight, None where a trace has none"""

    effect_X: Floats
    low_X: Floats
    high_X: Floats
    mass_effect_X: Floats | None
    log_odds_X: list[LogOdds]
    t_X: Floats
    p_X: Floats
    q_X: Floats
    family_p_X: Floats
    stability_X: Floats


@dataclass(frozen=True, slots=True)
class Controls:
    """What the same demands find where there is nothing to find, or something else.

    shuffled: experts flagged with labels shuffled within pairs, of each shuffle
    topic_effect_X: the largest difference between two categories of reference prompts; None: fewer than
        two categories are large enough
    naive: experts that a test finds which takes tokens for independent (q of 1 %), and the same with
        labels shuffled within pairs: what such a test is worth
    same_token: the effects on the same tokens; None: the traces hold none
    """

    shuffled: tuple[int, ...]
    topic_effect_X: Floats | None
    topic_contrasts: int
    naive: int
    naive_shuffled: int
    same_token: SameToken | None


@dataclass(frozen=True, slots=True)
class Discovery:
    """flagged_X: the experts that meet all demands"""

    table: PromptTable
    demands: Demands
    num_pairs: int
    effects: Effects
    flagged_X: Bools
    controls: Controls
    stability_by_top: dict[int, int]

    @property
    def experts(self) -> list[tuple[int, int]]:
        """(layer number, expert id) of the flagged ones, those with the largest effect first."""
        order = np.argsort(-np.abs(self.effects.effect_X))
        return [self.table.experts_X[x] for x in order.tolist() if self.flagged_X[x]]

    @property
    def counts_by_effect(self) -> dict[float, int]:
        """How many experts have an effect beyond each size, sure or not."""
        return {size: int((np.abs(self.effects.effect_X) > size).sum()) for size in EFFECT_SIZES}

    @property
    def verdict(self) -> str:
        """For people, in a sentence or two."""
        found, shuffled = int(self.flagged_X.sum()), self.controls.shuffled
        if not found:
            largest = float(np.abs(self.effects.effect_X).max(initial=0.0))
            return (
                f"No signal: of {len(self.flagged_X)} experts none meets all demands (the largest "
                f"difference of activation rates is {largest:.3f}). Use more pairs, or another phase; "
                "do not lower the demands until something is found."
            )
        text = f"{found} of {len(self.flagged_X)} experts meet all demands."
        if shuffled and np.mean(shuffled) >= 0.1 * found:
            return (
                f"{text} But with labels shuffled within pairs it is {np.mean(shuffled):.1f} on "
                "average: chance would show as much, do not use them."
            )
        topic_X = self.controls.topic_effect_X
        if topic_X is not None:
            flagged = self.flagged_X
            ratio = np.median(
                np.abs(self.effects.effect_X[flagged]) / np.maximum(topic_X[flagged], 1e-9)
            )
            if ratio < 1:
                text = (
                    f"{text} But topics differ more: between two categories of reference prompts these "
                    f"experts' rates differ by more (median ratio {ratio:.2f}). They are likely to "
                    "fire on harmless prompts of another topic."
                )
        same = self.controls.same_token
        warning = "" if same is None else same.warning(self.effects.effect_X, self.flagged_X)
        return f"{text} {warning}".rstrip()


def discover(
    table: PromptTable, demands: Demands | None = None, *, say: Callable[[str], None] = lambda _: None
) -> Discovery:
    """Raises DiscoverError where there are too few pairs."""
    demands = demands or Demands()
    difference_PX = _differences(table, table.rates_NX)
    num_pairs, num_experts = difference_PX.shape
    if num_pairs < LEAST_PAIRS:
        raise DiscoverError(
            f"{num_pairs} pairs are too few to conclude anything; give {LEAST_PAIRS}, better 100"
        )
    say("sign flips")
    flips = SignFlips(difference_PX, flips=demands.flips, seed=demands.seed)
    say("resamples")
    effects = _effects(table, difference_PX, flips, demands)
    flagged_X = _flagged(effects.effect_X, effects.q_X, effects.stability_X, demands)
    say("controls")
    top = demands.top_of(num_experts)
    tops = sorted(
        {min(num_experts, size) for size in (top // 4, top // 2, top, 2 * top, 4 * top) if size}
    )
    return Discovery(
        table,
        demands,
        num_pairs,
        effects,
        flagged_X,
        _controls(table, difference_PX, flips, demands),
        {size: _num_stable(difference_PX, size, demands) for size in tops},
    )


def _differences(table: PromptTable, values_NX: NDArray[np.float32]) -> Floats:
    """[P, X]. Of prompts without pairs, each target prompt's partner is drawn: the mean is that of all
    reference prompts, and so many differences are independent as there are of the rarer label."""
    if any(table.pairs_N):
        return table.differences(values_NX)
    sides = [values_NX[table.is_target_N == side].astype(np.float64) for side in (True, False)]
    target_NX, reference_NX = sorted(sides, key=len)
    sign = 1.0 if target_NX is sides[0] else -1.0
    parts = np.array_split(np.random.default_rng(0).permutation(len(reference_NX)), len(target_NX))
    means_PX = np.stack([reference_NX[part].mean(axis=0) for part in parts])
    difference_PX: Floats = sign * (target_NX - means_PX)
    return difference_PX


def _effects(table: PromptTable, difference_PX: Floats, flips: SignFlips, demands: Demands) -> Effects:
    t_X = studentized(difference_PX)
    p_X = flips.p_X(t_X)
    low_X, high_X = _interval(difference_PX, demands)
    masses = table.masses_NX
    sums = []
    for side in (True, False):
        own_N = table.is_target_N == side
        tokens_N = table.tokens_N[own_N]
        sums.append((table.rates_NX[own_N].T.astype(np.float64) @ tokens_N, int(tokens_N.sum())))
    (chosen_1_X, tokens_1), (chosen_2_X, tokens_2) = sums
    return Effects(
        effect_X=difference_PX.mean(axis=0),
        low_X=low_X,
        high_X=high_X,
        mass_effect_X=None if masses is None else _differences(table, masses).mean(axis=0),
        log_odds_X=[
            log_odds(one, tokens_1, other, tokens_2)
            for one, other in zip(chosen_1_X.tolist(), chosen_2_X.tolist(), strict=True)
        ],
        t_X=t_X,
        p_X=p_X,
        q_X=benjamini_hochberg(p_X),
        family_p_X=flips.family_p_X(t_X),
        stability_X=stability(
            difference_PX,
            demands.top_of(difference_PX.shape[1]),
            resamples=demands.resamples,
            seed=demands.seed,
        ),
    )


def _interval(difference_PX: Floats, demands: Demands) -> tuple[Floats, Floats]:
    """95 %, by a bootstrap over pairs."""
    num_pairs = len(difference_PX)
    generator = np.random.default_rng(demands.seed + 1)
    count_SP = np.stack(
        [
            np.bincount(generator.integers(num_pairs, size=num_pairs), minlength=num_pairs)
            for _ in range(max(200, demands.resamples))
        ]
    )
    low_X, high_X = np.quantile(count_SP @ difference_PX / num_pairs, [0.025, 0.975], axis=0)
    return low_X, high_X


def _flagged(effect_X: Floats, q_X: Floats, stability_X: Floats, demands: Demands) -> Bools:
    found: Bools = (
        (q_X <= demands.q)
        & (np.abs(effect_X) >= demands.least_effect)
        & (stability_X >= demands.least_stability)
    )
    return found


def _num_stable(difference_PX: Floats, top: int, demands: Demands) -> int:
    share_X = stability(difference_PX, top, resamples=demands.resamples, seed=demands.seed)
    return int((share_X >= demands.least_stability).sum())


def _controls(
    table: PromptTable, difference_PX: Floats, flips: SignFlips, demands: Demands
) -> Controls:
    generator = np.random.default_rng(demands.seed + 2)
    signs = [generator.choice([-1.0, 1.0], len(difference_PX)) for _ in range(demands.shuffles)]
    shuffled = tuple(_num_flagged_shuffled(difference_PX, sign_P, flips, demands) for sign_P in signs)
    topic_effect_X, topic_contrasts = _topic_effect(table)
    is_target_N = table.is_target_N
    swapped_N = _swapped(table, generator)
    return Controls(
        shuffled,
        topic_effect_X,
        topic_contrasts,
        _num_naive(table, is_target_N),
        _num_naive(table, is_target_N ^ swapped_N),
        table.same_token,
    )


def _num_flagged_shuffled(
    difference_PX: Floats, sign_P: Floats, flips: SignFlips, demands: Demands
) -> int:
    shuffled_PX = difference_PX * sign_P[:, None]
    effect_X = shuffled_PX.mean(axis=0)
    q_X = benjamini_hochberg(flips.p_X(studentized(shuffled_PX)))
    if not ((q_X <= demands.q) & (np.abs(effect_X) >= demands.least_effect)).any():
        return 0
    top = demands.top_of(difference_PX.shape[1])
    stability_X = stability(shuffled_PX, top, resamples=demands.resamples, seed=demands.seed)
    return int(_flagged(effect_X, q_X, stability_X, demands).sum())


def _topic_effect(table: PromptTable) -> tuple[Floats | None, int]:
    """[X], and of how many contrasts it is the largest."""
    categories_N = np.array(table.categories_N)
    means = []
    for category in sorted(set(table.categories_N) - {""}):
        own_N = (categories_N == category) & ~table.is_target_N
        if own_N.sum() >= LEAST_OF_CATEGORY:
            means.append(table.rates_NX[own_N].mean(axis=0, dtype=np.float64))
    contrasts: Sequence[Floats] = [np.abs(one - other) for one, other in combinations(means, 2)]
    return (np.max(contrasts, axis=0) if contrasts else None), len(contrasts)


def _swapped(table: PromptTable, generator: np.random.Generator) -> Bools:
    """Prompts whose label is exchanged: both of a pair, or any where there are none."""
    drawn = {pair: bool(generator.integers(2)) for pair in dict.fromkeys(table.pairs_N)}
    if not any(table.pairs_N):
        return generator.integers(2, size=table.num_prompts).astype(bool)
    return np.array([drawn[pair] for pair in table.pairs_N])


def _num_naive(table: PromptTable, is_target_N: Bools) -> int:
    rates, tokens = [], []
    for side in (True, False):
        own_N = is_target_N == side
        tokens.append(int(table.tokens_N[own_N].sum()))
        chosen_X = table.rates_NX[own_N].T.astype(np.float64) @ table.tokens_N[own_N]
        rates.append(chosen_X / tokens[-1])
    return int((naive_token_q(rates[0], tokens[0], rates[1], tokens[1]) <= 0.01).sum())
