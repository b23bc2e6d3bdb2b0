"""Sequential tests on a set's experts, token by token: how soon is an answer told from benign ones?

The log likelihood ratio takes tokens and experts for independent, which they are not: so thresholds are
taken from benign prompts' highest values, and never from Wald's bound, which is shown beside them. No
policy evaluates these tests; they say what a window gives away.

Letters: F experts of the set, T tokens of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

import numpy as np

from guard.discover.conformal import Floats, Proportion, conformal_threshold
from guard.discover.errors import DiscoverError
from guard.program.topology import Topology
from guard.program.verdict import Routing

MISSED: Final = 0.1
"""The share of target prompts that Wald's bound allows to be missed."""


class TokenRates(NamedTuple):
    """How often a token of the output chooses each expert: of benign prompts, and of target ones."""

    benign_F: Floats
    target_F: Floats


@dataclass(frozen=True, slots=True)
class SequentialSplit:
    """Outputs' choices, a bool [T, F] a prompt. Rates are taken from the first two, thresholds from the
    third, and what comes of it from the last two."""

    rates_benign: Sequence[np.ndarray]
    rates_target: Sequence[np.ndarray]
    calibration: Sequence[np.ndarray]
    benign: Sequence[np.ndarray]
    target: Sequence[np.ndarray]


class SequentialOutcome(NamedTuple):
    """tokens_to_detection: median over the target prompts that were detected; None: none was
    wald: false positives at Wald's bound for the same rate, on the same benign prompts
    """

    test: str
    budget: float
    threshold: float
    false_positives: Proportion
    detected: Proportion
    tokens_to_detection: float | None
    wald: Proportion


def chosen(routing: Routing, topology: Topology, experts: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [T, F]: which of the experts each token of the output chose with weight.

    experts: the model's own layer number, and the expert's id
    """
    row_of = topology.index_of_layer
    positions = [
        position
        for position in range(routing.num_prompt_tokens, len(routing.topk_ids))
        if routing.is_seen(position)
    ]
    ids_TLK, weights_TLK = routing.topk_ids[positions], routing.topk_weights[positions]
    columns = [
        ((ids_TLK[:, row_of[layer]] == expert) & (weights_TLK[:, row_of[layer]] != 0)).any(axis=-1)
        for layer, expert in experts
    ]
    return np.stack(columns, axis=-1)


def token_rates(benign: Sequence[np.ndarray], target: Sequence[np.ndarray]) -> TokenRates:
    """Means over tokens, with a half added to each count so that no ratio is infinite.

    Raises DiscoverError where one of the two has no token.
    """
    rates = []
    for side in (benign, target):
        num_tokens = sum(map(len, side))
        if not num_tokens:
            raise DiscoverError("a sequential test needs outputs of both labels")
        rates.append((np.sum([own.sum(axis=0) for own in side], axis=0) + 0.5) / (num_tokens + 1))
    return TokenRates(*rates)


def log_likelihood_ratio(chosen_TF: np.ndarray, rates: TokenRates) -> Floats:
    """[T]: of the target's rates over the benign ones."""
    benign_F, target_F = rates
    if_chosen_F = np.log(target_F / benign_F)
    if_not_F = np.log((1 - target_F) / (1 - benign_F))
    found: Floats = np.where(chosen_TF, if_chosen_F, if_not_F).sum(axis=1)
    return found


def sprt(ratio_T: Floats) -> Floats:
    """The sum up to each token (Wald 1945)."""
    return np.cumsum(ratio_T)


def cusum(ratio_T: Floats) -> Floats:
    """The same, which never falls below 0 (Page 1954): it finds a change wherever it begins."""
    sums_T = np.cumsum(ratio_T)
    lowest_T = np.minimum.accumulate(np.concatenate([[0.0], sums_T]))[:-1]
    found: Floats = sums_T - np.minimum(lowest_T, sums_T)
    return found


TESTS: Final[Mapping[str, Callable[[Floats], Floats]]] = {"SPRT": sprt, "CUSUM": cusum}


def wald_threshold(false_positives: float, missed: float = MISSED) -> float:
    """ln((1 - β) / α): what holds for independent draws whose rates are known."""
    return math.log((1 - missed) / false_positives)


def calibrate_sequential(split: SequentialSplit, budgets: Sequence[float]) -> list[SequentialOutcome]:
    """Raises DiscoverError where there are too few prompts."""
    rates = token_rates(split.rates_benign, split.rates_target)
    found = []
    for name, path_of in TESTS.items():
        calibration, benign, target = (
            [path_of(log_likelihood_ratio(own, rates)) for own in side]
            for side in (split.calibration, split.benign, split.target)
        )
        for budget in budgets:
            threshold = conformal_threshold(_highest(calibration), budget)
            tokens = [
                int(np.argmax(path_T > threshold)) + 1
                for path_T in target
                if (path_T > threshold).any()
            ]
            found.append(
                SequentialOutcome(
                    name,
                    budget,
                    threshold,
                    _beyond(benign, threshold),
                    Proportion.of(len(tokens), len(target)),
                    float(median(tokens)) if tokens else None,
                    _beyond(benign, wald_threshold(budget)),
                )
            )
    return found


def _highest(paths: Sequence[Floats]) -> Floats:
    return np.array([path_T.max(initial=-math.inf) for path_T in paths])


def _beyond(paths: Sequence[Floats], threshold: float) -> Proportion:
    return Proportion.of(int((_highest(paths) > threshold).sum()), len(paths))
