"""What a classifier of the prompts' words alone finds: if it does as well, routing adds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from guard.discover.calibration import auroc
from guard.discover.conformal import Floats, Proportion, conformal_threshold
from guard.discover.errors import DiscoverError


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts as texts. target, benign"""

    target: Sequence[str]
    benign: Sequence[str]


@dataclass(frozen=True, slots=True, eq=False)
class TextBaseline:
    """by_budget: false positives, and what was detected; a budget that there are too few prompts for is
    not in it
    benign_N, target_N: scores of the fresh prompts
    """

    auroc: float | None
    by_budget: dict[float, tuple[Proportion, Proportion]]
    benign_N: Floats
    target_N: Floats


def text_baseline(
    known: Texts, fresh: Texts, budgets: Sequence[float], *, seed: int = 0
) -> TextBaseline:
    """TF-IDF of words and pairs of words, and logistic regression, fitted to one half of the known
    prompts and calibrated on the benign ones of the other half.

    known: those that thresholds are calibrated on; fresh: those that show what comes of it

    Raises DiscoverError where a half has prompts of one label only.
    """
    generator = np.random.default_rng(seed)
    fit_target, _ = _halves(known.target, generator)
    fit_benign, calibration = _halves(known.benign, generator)
    if not fit_target or not fit_benign:
        raise DiscoverError("the text baseline needs two prompts of each label at least")
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(class_weight="balanced", max_iter=2000),
    )
    labels = [True] * len(fit_target) + [False] * len(fit_benign)
    model.fit([*fit_target, *fit_benign], labels)
    scores = [
        model.decision_function(texts) if texts else np.zeros(0)
        for texts in (calibration, list(fresh.benign), list(fresh.target))
    ]
    calibration_N, benign_N, target_N = scores
    by_budget = {}
    for budget in budgets:
        try:
            threshold = conformal_threshold(calibration_N, budget)
        except DiscoverError:
            continue
        by_budget[budget] = (
            Proportion.of(int((benign_N > threshold).sum()), len(benign_N)),
            Proportion.of(int((target_N > threshold).sum()), len(target_N)),
        )
    return TextBaseline(auroc(benign_N, target_N), by_budget, benign_N, target_N)


def _halves(texts: Sequence[str], generator: np.random.Generator) -> tuple[list[str], list[str]]:
    order = generator.permutation(len(texts)).tolist()
    middle = len(order) // 2
    return [texts[n] for n in order[:middle]], [texts[n] for n in order[middle:]]
