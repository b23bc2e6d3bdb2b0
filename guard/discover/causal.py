"""Does masking a set do what it is for, more than masking random experts does?

That routing goes with a label does not say that the experts cause anything. So the set is masked, and
beside it random sets of the same size in each layer and of about the same use; what is compared is the
loss on texts of the target label, and what becomes of everything else. The ratio to the random sets is
the anchor: 4 to 6 in MoTE (arXiv 2502.11096).

Letters: N texts, S random sets. Losses are sums of negative log-likelihoods in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.discover.errors import DiscoverError

Floats = NDArray[np.float64]
ExpertId = tuple[int, int]
"""(the model's own layer number, logical expert id)."""

NEAREST: Final = 4
"""A random expert is drawn from so many of its layer whose use is nearest."""
LEAST_TEXTS: Final = 8
RESAMPLES: Final = 2000
DECIMALS: Final = 4


@dataclass(frozen=True, slots=True)
class CausalDemands:
    """least_ratio: of the target's increase to that under random sets, whose interval must be above 1
    most_collateral: the largest increase of the reference texts' loss, as a share of it
    """

    least_ratio: float = 4.0
    most_collateral: float = 0.02


class Losses(NamedTuple):
    """Of some texts.

    tokens_N: how many count; unmasked_N, masked_N, random_SN: sums over them
    """

    tokens_N: NDArray[np.int64]
    unmasked_N: Floats
    masked_N: Floats
    random_SN: Floats


class TaskOutcome(NamedTuple):
    """Exact answers, true where it was given. random_SN: under each random set"""

    unmasked_N: NDArray[np.bool_]
    masked_N: NDArray[np.bool_]
    random_SN: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CausalCheck:
    """Increases are of the mean loss of a token, in nats; intervals are 95 %, by a bootstrap over texts
    and, for the ratio, over random sets as well.

    ratio, ratio_low: infinite where the random sets raised nothing
    reference_increase: as a share of what the loss was
    """

    method: str
    num_texts: int
    target_increase: float
    target_interval: tuple[float, float]
    random_increases: tuple[float, ...]
    ratio: float
    ratio_low: float
    reference_increase: float
    reference_interval: tuple[float, float]
    random_reference_increases: tuple[float, ...]
    task: TaskOutcome | None
    demands: CausalDemands

    @property
    def failures(self) -> list[str]:
        """What it does not show, for people; empty where the set passed."""
        found = []
        if self.target_interval[0] <= 0:
            found.append(
                "masking the set does not surely raise the target's loss (95 % interval "
                f"{self.target_interval[0]:+.3f} to {self.target_interval[1]:+.3f} nats a token)"
            )
        elif self.ratio < self.demands.least_ratio or self.ratio_low <= 1:
            found.append(
                f"it raises the target's loss {self.ratio:.1f} times as much as random sets of the "
                f"same layers and use do (at least {self.ratio_low:.1f}); "
                f"{self.demands.least_ratio:g} times, and surely more than once, is asked"
            )
        if self.reference_increase > self.demands.most_collateral:
            found.append(
                f"it raises the loss of the reference texts by {self.reference_increase:.1%}; at most "
                f"{self.demands.most_collateral:.1%} is asked"
            )
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """For people, in a sentence or two."""
        if self.passed:
            times = "infinitely many" if np.isinf(self.ratio) else f"{self.ratio:.1f}"
            return (
                f"Passed: masking the set raises the target's loss {times} times as much as random "
                f"sets do, and the reference texts' by {self.reference_increase:+.2%}."
            )
        return f"Did not pass: {'; '.join(self.failures)}."

    def as_profile(self, data: Mapping[str, str]) -> dict[str, Any]:
        """As a profile's `causal` has it. data: SHA-256 by file name"""
        found: dict[str, Any] = {
            "passed": self.passed,
            "method": self.method,
            "texts": self.num_texts,
            "targetIncrease": _number(self.target_increase),
            "targetInterval": [_number(end) for end in self.target_interval],
            "randomIncreases": [_number(one) for one in self.random_increases],
            "referenceIncrease": _number(self.reference_increase),
            "referenceInterval": [_number(end) for end in self.reference_interval],
        }
        for key, value in (("ratio", self.ratio), ("ratioLow", self.ratio_low)):
            if np.isfinite(value):
                found[key] = _number(value)
        if self.task is not None:
            found["tasks"] = {
                "prompts": len(self.task.unmasked_N),
                "unmasked": _number(self.task.unmasked_N.mean()),
                "masked": _number(self.task.masked_N.mean()),
                "random": _number(self.task.random_SN.mean()),
            }
        return found | {"data": dict(data)}

    def as_report(self, name: str, data: Mapping[str, str]) -> dict[str, Any]:
        """For `moe-guard report`."""
        return {
            "kind": "CausalCheck",
            "version": 1,
            "set": name,
            "verdict": self.verdict,
            "randomReferenceIncreases": [_number(one) for one in self.random_reference_increases],
            **self.as_profile(data),
        }


def random_sets(
    experts: Sequence[ExpertId], use: Mapping[ExpertId, float], num_sets: int, seed: int
) -> list[list[ExpertId]]:
    """As many of each layer as there are of it in `experts`, none of these, each drawn among the few
    whose use is nearest to one of them; no two sets are the same.

    use: selections a token. Raises DiscoverError where a layer has too few others.
    """
    flagged = set(experts)
    generator = np.random.default_rng(seed)
    drawn: list[list[ExpertId]] = []
    for _ in range(100 * num_sets):
        one = sorted(_random_set(sorted(flagged), use, generator))
        if one not in drawn:
            drawn.append(one)
        if len(drawn) == num_sets:
            return drawn
    raise DiscoverError(
        f"there are not {num_sets} different random sets to compare with: the set has nearly half of a "
        "layer's experts"
    )


def _random_set(
    experts: Sequence[ExpertId], use: Mapping[ExpertId, float], generator: np.random.Generator
) -> list[ExpertId]:
    left = set(use) - set(experts)
    found = []
    for number in generator.permutation(len(experts)).tolist():
        layer, own_use = experts[number][0], use[experts[number]]
        others = sorted(one for one in left if one[0] == layer)
        if not others:
            raise DiscoverError(
                f"layer {layer}: more than half of its experts are in the set; nothing random is left "
                "to compare it with"
            )
        others.sort(key=lambda one: abs(use[one] - own_use))
        chosen = others[int(generator.integers(min(NEAREST, len(others))))]
        left.discard(chosen)
        found.append(chosen)
    return found


def causal_check(
    method: str,
    target: Losses,
    reference: Losses,
    task: TaskOutcome | None = None,
    demands: CausalDemands | None = None,
    seed: int = 0,
) -> CausalCheck:
    """Raises DiscoverError where there are too few texts."""
    for name, losses in (("target", target), ("reference", reference)):
        if len(losses.tokens_N) < LEAST_TEXTS:
            raise DiscoverError(
                f"{len(losses.tokens_N)} texts of the {name} label are too few; give {LEAST_TEXTS}, "
                "better 100"
            )
    generator = np.random.default_rng(seed)
    num_texts, num_sets = len(target.tokens_N), len(target.random_SN)
    everything = np.ones(num_texts)
    every_set = np.arange(num_sets)
    increase, ratio = _target(target, everything, every_set)
    resampled = [
        _target(target, _draw(generator, num_texts), generator.integers(num_sets, size=num_sets))
        for _ in range(RESAMPLES)
    ]
    ratios = np.array([one for _, one in resampled])
    num_reference = len(reference.tokens_N)
    collateral = [_relative(reference, _draw(generator, num_reference)) for _ in range(RESAMPLES)]
    unmasked = reference.unmasked_N.sum()
    return CausalCheck(
        method,
        num_texts,
        increase,
        _interval(np.array([one for one, _ in resampled])),
        tuple(((target.random_SN - target.unmasked_N).sum(axis=1) / target.tokens_N.sum()).tolist()),
        ratio,
        # of numbers of which some are infinite no quantile is interpolated
        float(np.quantile(ratios, 0.025, method="lower")),
        _relative(reference, np.ones(num_reference)),
        _interval(np.array(collateral)),
        tuple(((reference.random_SN.sum(axis=1) - unmasked) / unmasked).tolist()),
        task,
        demands or CausalDemands(),
    )


def _draw(generator: np.random.Generator, size: int) -> Floats:
    """How often each is in a resample."""
    counts: Floats = np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float64)
    return counts


def _target(losses: Losses, count_N: Floats, sets: NDArray[np.int64]) -> tuple[float, float]:
    """The increase by the set, and its ratio to the mean of those by random ones."""
    tokens = count_N @ losses.tokens_N
    increase = float(count_N @ (losses.masked_N - losses.unmasked_N) / tokens)
    by_random_S = (losses.random_SN[sets] - losses.unmasked_N) @ count_N / tokens
    mean = float(by_random_S.mean())
    if mean > 0:
        return increase, increase / mean
    return increase, np.inf if increase > 0 else 0.0


def _relative(losses: Losses, count_N: Floats) -> float:
    before = count_N @ losses.unmasked_N
    return float(count_N @ (losses.masked_N - losses.unmasked_N) / before)


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _number(value: float) -> float:
    return round(float(value), DECIMALS)
