"""Thresholds of conditions, judged as a server judges them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from guard.discover.calibration import Calibrated, Measured, Split, auroc, calibrate
from guard.discover.errors import DiscoverError
from guard.discover.text_baseline import Texts, text_baseline
from guard.policy import PolicyError
from guard.policy.model import Phase
from guard.program.verdict import Routing
from tests.support.planted_trace import Planted

PLANTED = Planted(layers=4, experts=16, planted=4, pairs=240, tokens=40, effect=2.0)
RATE = Measured(Phase.OUTPUT, {"rate": {"experts": "planted", "over": 16}})
TOTAL = Measured(Phase.OUTPUT, {"rate": {"experts": "planted", "over": "output", "minTokens": 8}})
ABSENT = Measured(Phase.OUTPUT, {"rate": {"experts": "planted", "over": 16}}, "below")


def profile() -> dict[str, Any]:
    entries = [{"layer": layer, "experts": [expert]} for layer, expert in PLANTED.planted_experts]
    return {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": "PlantedForCausalLM"},
        "sets": {"planted": entries},
    }


@cache
def split() -> Split:
    requests = list(PLANTED.requests())
    benign = [one.routing for one in requests if one.labels["label"] == "benign"]
    target = [one.routing for one in requests if one.labels["label"] == "target"]
    return Split(benign[:120], benign[120:], target[120:])


@cache
def calibrated() -> list[Calibrated]:
    return calibrate(profile(), PLANTED.topology, [RATE, TOTAL, ABSENT], [0.01, 0.05], split())


def rates(routing: Routing) -> np.ndarray:
    """Of each output token, the share of the planted experts that it chose."""
    ids_TLK = routing.topk_ids[routing.num_prompt_tokens :]
    chosen = [(ids_TLK[:, layer] == expert).any(axis=-1) for layer, expert in PLANTED.planted_experts]
    return np.asarray(np.mean(chosen, axis=0))


def highest(routing: Routing) -> float:
    return float(max(np.convolve(rates(routing), np.full(16, 1 / 16), "valid")))


def test_the_threshold_is_the_order_statistic_of_each_prompts_highest_window() -> None:
    ordered = sorted(map(highest, split().calibration))
    outcome = calibrated()[0].by_budget[0.05]
    exact = ordered[int(np.ceil(121 * 0.95)) - 1]
    assert exact - 1e-9 <= outcome.threshold < exact + 1e-4
    assert outcome.threshold == round(outcome.threshold, 4)


def test_what_is_said_of_fresh_prompts_is_counted_in_them() -> None:
    found = calibrated()[0].by_budget[0.05]
    benign = [highest(routing) > found.threshold for routing in split().benign]
    target = [highest(routing) > found.threshold for routing in split().target]
    assert found.false_positives[:2] == (sum(benign), len(benign))
    assert found.detected is not None
    assert found.detected[:2] == (sum(target), len(target))
    assert found.false_positives.low <= 0.05


def test_detection_is_timed_in_tokens_of_the_phase() -> None:
    found = calibrated()[1].by_budget[0.01]
    tokens = []
    for routing in split().target:
        means = np.cumsum(rates(routing)) / np.arange(1, 41)
        fires = np.flatnonzero(means[7:] > found.threshold)
        if len(fires):
            tokens.append(int(fires[0]) + 8)
    assert found.tokens_to_detection == np.median(tokens)


def test_a_smaller_budget_is_never_easier_to_reach() -> None:
    for one in calibrated():
        strict, loose = one.by_budget[0.01], one.by_budget[0.05]
        assert one.condition.sign * (strict.threshold - loose.threshold) >= 0


def test_a_condition_that_is_alarming_below_has_its_threshold_on_that_side() -> None:
    lowest = sorted(
        float(min(np.convolve(rates(r), np.full(16, 1 / 16), "valid"))) for r in split().calibration
    )
    absent = calibrated()[2]
    assert absent.by_budget[0.05].threshold == pytest.approx(
        lowest[120 - int(np.ceil(121 * 0.95))], abs=2e-6
    )
    assert absent.as_threshold()["budgets"][1] == {
        "budget": 0.05,
        "below": absent.by_budget[0.05].threshold,
    }


def test_planted_experts_tell_the_labels_apart() -> None:
    total = calibrated()[1]
    assert total.auroc is not None
    assert total.auroc > 0.95


def test_a_condition_that_the_profile_cannot_serve_is_refused() -> None:
    unknown = Measured(Phase.OUTPUT, {"rate": {"experts": "plantd", "over": 16}})
    with pytest.raises(PolicyError, match="plantd"):
        calibrate(profile(), PLANTED.topology, [unknown], [0.05], split())


def test_a_condition_that_is_never_known_is_refused() -> None:
    long = Measured(Phase.OUTPUT, {"rate": {"experts": "planted", "over": 512}})
    with pytest.raises(DiscoverError, match="known in too few benign prompts"):
        calibrate(profile(), PLANTED.topology, [long], [0.05], split())


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    benign, target = generator.integers(0, 9, 40) / 1.0, generator.integers(3, 12, 30) / 1.0
    labels = [False] * 40 + [True] * 30
    assert auroc(benign, target) == pytest.approx(roc_auc_score(labels, [*benign, *target]))
    assert auroc(benign, target[:0]) is None


def test_the_text_baseline_finds_what_words_give_away_and_nothing_else() -> None:
    telling = Texts(
        [f"how to pick lock {n}" for n in range(60)], [f"how to bake bread {n}" for n in range(60)]
    )
    same = Texts(
        [f"question number {n}" for n in range(60)], [f"question number {n}" for n in range(60, 120)]
    )
    assert text_baseline(telling, telling, [0.05]).auroc == 1.0
    silent = text_baseline(same, same, [0.05]).auroc
    assert silent is not None
    assert abs(silent - 0.5) < 0.3


def test_a_budget_that_there_are_too_few_prompts_for_is_left_out_of_the_baseline() -> None:
    texts = Texts(["lock one", "lock two", "lock six", "lock ten"], ["bread"] * 4)
    assert text_baseline(texts, texts, [0.01, 0.5]).by_budget.keys() == {0.5}
