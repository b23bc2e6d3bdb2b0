"""A linear probe on the load histogram, and what it is worth on prompts of a kind it never saw.

The features are a prompt's activation rates, so the probe is one that a policy can evaluate at serving
time (`probe`, over a window). As in RouteScan (arXiv 2605.24817). It is fitted to prompts without
partners as well: one that never saw other harmless topics takes them for anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline

from guard.discover.effects import Floats
from guard.discover.table import NO_PARTNER, Choice, PromptTable, read_table

FOLDS = 5
WINDOW_TOKENS = 32
"""A policy reads the probe over windows of about so many tokens, whose rates scatter more than those of
whole prompts. A rare expert shall not decide by that."""
REGULARIZATION = 0.05
"""C of the logistic regression, on standardised rates: as in arXiv 2610.07774."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ProbeQuality:
    """Areas under the ROC curve, on prompts that the probe was not fitted to.

    in_domain: pairs left out, of categories that it knows; None: too few pairs
    held_out: by category that was left out as a whole; what to expect of something new
    """

    in_domain: float | None
    held_out: Mapping[str, float]

    @property
    def worst_held_out(self) -> float | None:
        return min(self.held_out.values(), default=None)


@dataclass(frozen=True, slots=True)
class Probe:
    """sigmoid(rates · weights + bias) is the probability of the target label.

    weights_X: of a rate, by expert
    """

    weights_X: Floats
    bias: float
    quality: ProbeQuality


def fit_probe(table: PromptTable) -> Probe:
    features_NX, is_target_N = table.rates_NX.astype(np.float64), table.is_target_N
    fitted = _model().fit(features_NX, is_target_N)
    scaler, regression = fitted.named_steps.values()
    weights_X = regression.coef_[0] / scaler.scale_X
    bias = float(regression.intercept_[0] - scaler.mean_X @ weights_X)
    quality = ProbeQuality(
        _mean_auroc(features_NX, is_target_N, _folds(table)),
        {
            category: auroc
            for category, split in _without_category(table)
            if (auroc := _auroc(features_NX, is_target_N, *split)) is not None
        },
    )
    return Probe(weights_X, bias, quality)


def probe_table(paths: Sequence[Path], choice: Choice, table: PromptTable) -> PromptTable:
    """table: of the pairs; with the prompts that have no partner, where that makes it larger.

    Raises DiscoverError, TraceError.
    """
    if not choice.is_paired or NO_PARTNER not in table.left_out:
        return table
    everything = read_table(paths, replace(choice, is_paired=False))
    return everything if everything.num_prompts > table.num_prompts else table


class RateScaler(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Divides a rate by how far it scatters between prompts and within a window of one."""

    def fit(self, features_NX: Floats, _: Bools | None = None) -> Self:
        self.mean_X = features_NX.mean(axis=0)
        share_X = self.mean_X.clip(0.0, 1.0)
        within_X = share_X * (1 - share_X) / WINDOW_TOKENS
        scale_X = np.sqrt(features_NX.var(axis=0) + within_X)
        self.scale_X = np.where(scale_X > 0, scale_X, 1.0)
        return self

    def transform(self, features_NX: Floats) -> Floats:
        scaled_NX: Floats = (features_NX - self.mean_X) / self.scale_X
        return scaled_NX


def _model() -> Pipeline:
    regression = LogisticRegression(C=REGULARIZATION, class_weight="balanced", max_iter=2000)
    return make_pipeline(RateScaler(), regression)


_Split = tuple[NDArray[np.int64], NDArray[np.int64]]


def _folds(table: PromptTable) -> list[_Split]:
    """Both prompts of a pair on the same side."""
    groups = [pair or f"prompt {n}" for n, pair in enumerate(table.groups_N or table.pairs_N)]
    if len(set(groups)) < 2 * FOLDS:
        return []
    return list(GroupKFold(FOLDS).split(table.rates_NX, groups=groups))


def _without_category(table: PromptTable) -> Iterator[tuple[str, _Split]]:
    categories_N = np.array(table.categories_N)
    for category in sorted(set(table.categories_N) - {""}):
        is_held_out_N = categories_N == category
        yield category, (np.flatnonzero(~is_held_out_N), np.flatnonzero(is_held_out_N))


def _mean_auroc(features_NX: Floats, is_target_N: Bools, splits: Sequence[_Split]) -> float | None:
    found = [_auroc(features_NX, is_target_N, *split) for split in splits]
    known = [auroc for auroc in found if auroc is not None]
    return float(np.mean(known)) if known else None


def _auroc(
    features_NX: Floats, is_target_N: Bools, fit_N: NDArray[np.int64], test_N: NDArray[np.int64]
) -> float | None:
    """None: one of the two sides has prompts of one label only."""
    if len(set(is_target_N[fit_N])) < 2 or len(set(is_target_N[test_N])) < 2:
        return None
    scores = _model().fit(features_NX[fit_N], is_target_N[fit_N]).decision_function(features_NX[test_N])
    return float(roc_auc_score(is_target_N[test_N], scores))
