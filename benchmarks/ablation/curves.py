"""What the target loses against what benign text loses, along a growing ablation.

Shapes: P points of a curve (0 is the whole model), D documents, R resamples of the documents,
G topics (the target, the benign ones, the familiar ones), L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from benchmarks.ablation.choose import activations
from benchmarks.ablation.texts import BENIGN, FAMILIAR, TARGET, Corpus, Floats, loss_sums_D
from benchmarks.ablation.twins import Model
from benchmarks.ablation.units import Order, Unit, ablated, first_of, layout
from demo.names import Split

MEASURED: Final = (TARGET, *BENIGN, *FAMILIAR)
SIDES: Final = {
    "held-out": slice(1, 1 + len(BENIGN)),
    "familiar": slice(1 + len(BENIGN), len(MEASURED)),
}
"""The two sorts of benign text, as places among `MEASURED`."""

BUDGETS: Final = (0.02, 0.05)
ENOUGH: Final = 0.06
"""A curve ends where both sorts of benign text have lost so much more,"""
TOO_MUCH: Final = 0.30
"""or one of them so much; nothing is asked beyond."""
RESAMPLES: Final = 1000
FIRST_SHARE: Final = 1 / 512
MOST: Final = 0.75
GROWTH: Final = 1.5


@dataclass(frozen=True, slots=True)
class Curve:
    """One model's losses while more of its units are taken out, in an order.

    sizes_P: how many units; sums_PD: the summed loss of each document's answer. Shares are of the
    model's parameters: those taken out, and those of them that a token would have used, on average.
    """

    model: str
    seed: int
    unit: str
    method: str
    sizes_P: tuple[int, ...]
    sums_PD: Floats
    share_P: Floats
    target_active_P: Floats
    benign_active_P: Floats


def steps(unit: Unit, count: int) -> list[int]:
    """How many units go: of experts one more each time, of neurons half as many again."""
    most = int(MOST * count)
    if unit is not Unit.NEURONS:
        return list(range(1, most + 1))
    sizes = {1}
    size = FIRST_SHARE * count
    while size <= most:
        sizes.add(max(1, round(size)))
        size *= GROWTH
    return sorted(sizes)


class Meter:
    """Measures curves of one model on held-out text."""

    def __init__(self, model: Model, held_out: Corpus, name: str, seed: int) -> None:
        assert held_out.split is Split.HELD_OUT, "a curve is measured on text that chose nothing"
        self.model, self.held_out, self.name, self.seed = model, held_out, name, seed
        self.layout = layout(model)
        self.whole_D = loss_sums_D(model, held_out)
        self.rates_GLE = activations(model, held_out)[0].double().numpy()
        self.parameters = model.num_parameters()
        idle = self.layout.layers * (self.layout.experts - self.layout.top_k)
        self.active_parameters = self.parameters - idle * self.layout.parameters(Unit.REROUTED)

    def curve(self, order: Order, unit: Unit, method: str) -> Curve:
        sizes_P, sums_PD = [0], [self.whole_D]
        masks = [first_of(order, 0, self.layout, unit)]
        for count in steps(unit, len(order)):
            masks.append(first_of(order, count, self.layout, unit))
            sizes_P.append(count)
            with ablated(self.model, unit, masks[-1]):
                sums_PD.append(loss_sums_D(self.model, self.held_out))
            if _is_at_end(topic_losses(self.held_out, np.stack([sums_PD[0], sums_PD[-1]]))):
                break
        gone_PLE = np.stack(
            [
                mask.numpy().reshape(self.layout.layers, self.layout.experts, -1).sum(-1)
                for mask in masks
            ]
        ) * self.layout.parameters(unit)
        used_PG = np.einsum("ple,gle->pg", gone_PLE, self.rates_GLE) / self.active_parameters
        return Curve(
            self.name,
            self.seed,
            str(unit),
            method,
            tuple(sizes_P),
            np.stack(sums_PD),
            gone_PLE.sum((1, 2)) / self.parameters,
            used_PG[:, 0],
            used_PG[:, 1:].mean(1),
        )


def _is_at_end(losses_PG: Floats) -> bool:
    growths = [float(damage(losses_PG, side).benign_P[-1]) for side in SIDES]
    return min(growths) > ENOUGH or max(growths) > TOO_MUCH


def topic_losses(texts: Corpus, sums_PD: Floats, times_D: Floats | None = None) -> Floats:
    """Mean loss of an answer's token by topic, [P, G], with each document counted so many times."""
    times_D = np.ones(len(texts.topics)) if times_D is None else times_D
    columns = []
    for topic in MEASURED:
        own = texts.members(topic)
        columns.append((sums_PD[:, own] @ times_D[own]) / (texts.answer_tokens_D[own] @ times_D[own]))
    return np.stack(columns, axis=1)


class Damage(NamedTuple):
    """Along a curve: the target's growth in nats, the benign mean's as a share of itself, and that
    of the benign topic which fares worst, in nats."""

    target_P: Floats
    benign_P: Floats
    worst_P: Floats


def damage(losses_PG: Floats, side: str) -> Damage:
    """side: which benign text"""
    benign_PG = losses_PG[:, SIDES[side]]
    mean_P = benign_PG.mean(1)
    return Damage(
        losses_PG[:, 0] - losses_PG[0, 0],
        mean_P / mean_P[0] - 1,
        (benign_PG - benign_PG[0]).max(1),
    )


def place_at(benign_P: Floats, budget: float) -> tuple[float, bool]:
    """Where on the curve, between its points, the budget is first used up; and whether it is at all,
    since some curves end before."""
    over = np.flatnonzero(benign_P > budget)
    if not len(over):
        return float(len(benign_P) - 1), False
    last = int(over[0])
    low, high = benign_P[last - 1], benign_P[last]
    return last - 1 + float((budget - low) / (high - low)), True


def at_place(values_P: Floats | Sequence[int], place: float) -> float:
    return float(np.interp(place, np.arange(len(values_P)), values_P))


def resampled(texts: Corpus, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """How often each document is drawn, with replacement within its topic: [R, D]."""
    random = np.random.default_rng(seed)
    times_RD = np.zeros((resamples, len(texts.topics)))
    for topic in MEASURED:
        own = texts.members(topic)
        times_RD[:, own] = random.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples)
    return times_RD


def target_at(curve: Curve, texts: Corpus, side: str, budget: float, times_RD: Floats) -> Floats:
    """The target's growth where the benign budget is used up, for each resample: [R]."""
    found = []
    for times_D in times_RD:
        target_P, benign_P, _ = damage(topic_losses(texts, curve.sums_PD, times_D), side)
        found.append(at_place(target_P, place_at(benign_P, budget)[0]))
    return np.array(found)


def interval(values_R: Floats) -> tuple[float, float]:
    low, high = np.quantile(values_R, [0.025, 0.975])
    return float(low), float(high)
