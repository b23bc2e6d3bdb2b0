"""Thresholds of conditions by false-positive budget, and what they come to on prompts set aside.

A condition is judged as a server judges it: position by position, by the same evaluator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from guard.discover.conformal import Floats, Proportion, conformal_threshold
from guard.discover.errors import DiscoverError
from guard.offline.evaluator import OfflineEvaluator, OfflineRequest
from guard.policy import load_policies
from guard.policy.model import Phase
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.topology import Topology
from guard.program.verdict import Routing

_RULE = "condition-{}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A condition without its threshold, as `thresholds` of a profile has it.

    when: its kind and its words
    direction: above or below, whichever is alarming
    """

    phase: Phase
    when: Mapping[str, Mapping[str, Any]]
    direction: str = "above"

    @property
    def sign(self) -> float:
        return 1.0 if self.direction == "above" else -1.0

    def __str__(self) -> str:
        [(kind, words)] = self.when.items()
        return f"{kind} {json.dumps(dict(words))} in {self.phase.value}"


@dataclass(frozen=True, slots=True)
class Split:
    """Prompts that are calibrated on, and others that show what comes of it."""

    calibration: Sequence[Routing]
    benign: Sequence[Routing]
    target: Sequence[Routing] = ()


class Outcome(NamedTuple):
    """Of one condition at one budget.

    false_positives: of the benign prompts set aside
    detected: of the target prompts; None where there are none
    tokens_to_detection: median over those detected, counted from the first token of the phase on
    """

    threshold: float
    false_positives: Proportion
    detected: Proportion | None
    tokens_to_detection: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """benign_N, target_N: the furthest value in each prompt set aside; NaN: never known"""

    condition: Measured
    by_budget: Mapping[float, Outcome]
    auroc: float | None
    benign_N: Floats
    target_N: Floats

    def as_threshold(self) -> dict[str, Any]:
        """An entry of a profile's `thresholds`."""
        return {
            "phase": self.condition.phase.value,
            "when": {kind: dict(words) for kind, words in self.condition.when.items()},
            "budgets": [
                {"budget": budget, self.condition.direction: outcome.threshold}
                for budget, outcome in self.by_budget.items()
            ],
        }


def calibrate(
    profile: Mapping[str, Any],
    topology: Topology,
    conditions: Sequence[Measured],
    budgets: Sequence[float],
    split: Split,
) -> list[Calibrated]:
    """profile: what conditions read, as JSON has it; its own `thresholds` are not read

    Raises PolicyError for a condition that the profile cannot serve; DiscoverError for too few prompts.
    """
    watching = _program(profile, topology, conditions, [0.0] * len(conditions))
    calibration_NC, benign_NC, target_NC = (
        _furthest(watching, routings, conditions)
        for routings in (split.calibration, split.benign, split.target)
    )
    thresholds = {
        budget: [conformal_threshold(values_N, budget) for values_N in calibration_NC.T]
        for budget in budgets
    }
    for budget, values in thresholds.items():
        for condition, value in zip(conditions, values, strict=True):
            if np.isinf(value):
                raise DiscoverError(
                    f"{condition}: it was known in too few benign prompts for a threshold at "
                    f"{budget:g}; lower its minTokens, or record longer answers"
                )
    latencies = {
        budget: _tokens_to_detection(
            _program(profile, topology, conditions, _unsigned(conditions, values)),
            conditions,
            split.target,
        )
        for budget, values in thresholds.items()
    }
    return [
        Calibrated(
            condition,
            {
                budget: _outcome(
                    _unsigned(conditions, thresholds[budget])[c],
                    thresholds[budget][c],
                    benign_NC[:, c],
                    target_NC[:, c],
                    latencies[budget][c],
                )
                for budget in budgets
            },
            auroc(benign_NC[:, c], target_NC[:, c]),
            condition.sign * benign_NC[:, c],
            condition.sign * target_NC[:, c],
        )
        for c, condition in enumerate(conditions)
    ]


def auroc(benign_N: Floats, target_N: Floats) -> float | None:
    """The probability that a target prompt is further than a benign one (Mann and Whitney 1947). NaN is
    furthest from firing."""
    if not len(benign_N) or not len(target_N):
        return None
    benign = np.sort(np.nan_to_num(benign_N, nan=-np.inf))
    target = np.nan_to_num(target_N, nan=-np.inf)
    below = np.searchsorted(benign, target, side="left")
    not_above = np.searchsorted(benign, target, side="right")
    return float((below + not_above).mean() / (2 * len(benign)))


def _unsigned(conditions: Sequence[Measured], values: Sequence[float]) -> list[float]:
    """As a policy writes them."""
    return [one.sign * value + 0.0 for one, value in zip(conditions, values, strict=True)]


def _outcome(
    threshold: float,
    signed: float,
    benign_N: Floats,
    target_N: Floats,
    tokens: Sequence[int],
) -> Outcome:
    detected = Proportion.of(int((target_N > signed).sum()), len(target_N)) if len(target_N) else None
    return Outcome(
        threshold,
        Proportion.of(int((benign_N > signed).sum()), len(benign_N)),
        detected,
        float(median(tokens)) if tokens else None,
    )


def _furthest(program: Program, routings: Sequence[Routing], conditions: Sequence[Measured]) -> Floats:
    """[N, C]: each condition's value in each request that is nearest to firing, or furthest beyond;
    more is more alarming, whichever way it points. NaN: never known."""
    sign_C = np.array([condition.sign for condition in conditions])
    outcomes = OfflineEvaluator(program).outcomes(map(OfflineRequest, routings))
    found = [outcome.extremes_C * sign_C for outcome in outcomes]
    return np.stack(found) if found else np.zeros((0, len(conditions)))


def _tokens_to_detection(
    program: Program, conditions: Sequence[Measured], routings: Sequence[Routing]
) -> list[list[int]]:
    """Of each condition, for the requests in which it fires, how many tokens of its phase had been
    judged."""
    number_of = {_RULE.format(c): c for c in range(len(conditions))}
    found: list[list[int]] = [[] for _ in conditions]
    outcomes = OfflineEvaluator(program).outcomes(map(OfflineRequest, routings))
    for routing, outcome in zip(routings, outcomes, strict=True):
        seen: set[int] = set()
        for firing in outcome.verdict.firings:
            c = number_of[firing.rule]
            if c not in seen:
                seen.add(c)
                is_output = conditions[c].phase is Phase.OUTPUT
                found[c].append(firing.position + 1 - (routing.num_prompt_tokens if is_output else 0))
    return found


def _program(
    profile: Mapping[str, Any],
    topology: Topology,
    conditions: Sequence[Measured],
    thresholds: Sequence[float],
) -> Program:
    """A policy that observes, with a rule for each condition."""
    rules = [
        {
            "name": _RULE.format(c),
            "match": {"phase": condition.phase.value},
            "when": {
                kind: {**words, condition.direction: threshold}
                for kind, words in condition.when.items()
            },
        }
        for c, (condition, threshold) in enumerate(zip(conditions, thresholds, strict=True))
    ]
    names = {
        words["experts"] for one in conditions for words in one.when.values() if "experts" in words
    }
    policy = {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {"name": "calibration"},
        "spec": {
            "profile": "profile.json",
            "experts": {name: [{"set": name}] for name in sorted(names)},
            "rules": rules,
        },
    }
    with TemporaryDirectory() as folder:
        bare = {key: value for key, value in profile.items() if key != "thresholds"}
        Path(folder, "profile.json").write_text(json.dumps(bare), encoding="utf-8")
        Path(folder, "policy.yaml").write_text(json.dumps(policy), encoding="utf-8")
        return compile_policies(load_policies(folder), topology)
