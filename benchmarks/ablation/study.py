"""One model from training to its curves, and what all curves come to.

Shapes: R resamples of the documents, D documents, P points of a curve, G topics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from benchmarks.ablation.choose import orders
from benchmarks.ablation.curves import (
    BUDGETS,
    MEASURED,
    SIDES,
    Curve,
    Meter,
    at_place,
    damage,
    interval,
    place_at,
    resampled,
    target_at,
    topic_losses,
)
from benchmarks.ablation.texts import Corpus, Floats, corpus
from benchmarks.ablation.twins import Kind, Model, ensure_trained, load, load_tokenizer
from benchmarks.ablation.units import Unit, layout, random_order, units_of
from demo.names import Split

RANDOM: Final = "random"


@dataclass(frozen=True, slots=True)
class Studied:
    """train_s: None where the model was trained before"""

    kind: Kind
    seed: int
    parameters: int
    active_parameters: int
    train_s: float | None
    curves: list[Curve]


def study(kind: Kind, seed: int, draws: int) -> Studied:
    """Trains the model if need be, chooses on the choosing split, measures on the held-out one."""
    torch.set_num_threads(1)
    train_s = ensure_trained(kind, seed)
    model, tokenizer = load(kind, seed), load_tokenizer()
    choosing, held_out = (corpus(split, tokenizer) for split in (Split.CHOOSE, Split.HELD_OUT))
    meter = Meter(model, held_out, str(kind), seed)
    curves = curves_of(model, choosing, meter, draws)
    return Studied(kind, seed, meter.parameters, meter.active_parameters, train_s, curves)


def curves_of(model: Model, choosing: Corpus, meter: Meter, draws: int) -> list[Curve]:
    """Of every kind of unit the model has: both methods, and random orders of all units."""
    units, sizes = units_of(model), layout(model)
    found = [
        meter.curve(order, unit, str(method))
        for (unit, method), order in orders(model, choosing, units).items()
    ]
    for unit in units:
        for draw in range(draws):
            found.append(meter.curve(random_order(sizes, unit, draw), unit, f"{RANDOM} {draw}"))
    return found


def summary(curves: Sequence[Curve], held_out: Corpus) -> list[dict[str, Any]]:
    """A row for each model, unit, method, sort of benign text and budget: means over the seeds.

    Intervals are of the mean over these seeds when the documents are drawn anew; they say nothing of
    other seeds. `over_dense` is what the target loses more than that of the dense twin of the same
    seed, on the same documents, by the same method.
    """
    times_RD = np.concatenate([np.ones((1, len(held_out.topics))), resampled(held_out)])
    chosen = [curve for curve in curves if not curve.method.startswith(RANDOM)]
    rows = []
    for side in SIDES:
        for budget in BUDGETS:
            targets = {
                (c.model, c.seed, c.unit, c.method): target_at(c, held_out, side, budget, times_RD)
                for c in chosen
            }
            for model, unit, method in dict.fromkeys((c.model, c.unit, c.method) for c in chosen):
                own = [c for c in chosen if (c.model, c.unit, c.method) == (model, unit, method)]
                found = [targets[model, c.seed, unit, method] for c in own]
                row = {"side": side, "budget": budget, "model": model, "unit": unit, "method": method}
                row |= _with_interval("target", found)
                row["of_each_seed"] = {
                    c.seed: float(all_R[0]) for c, all_R in zip(own, found, strict=True)
                }
                there = [_there(c, curves, held_out, side, budget) for c in own]
                row |= {name: _mean([each[name] for each in there]) for name in there[0]}
                dense = [targets.get((Kind.DENSE, c.seed, Unit.NEURONS, method)) for c in own]
                pairs = [(a, b) for a, b in zip(found, dense, strict=True) if b is not None]
                if model != Kind.DENSE and len(pairs) == len(own):
                    row |= _with_interval("over_dense", [a - b for a, b in pairs])
                rows.append(row)
    return rows


def _with_interval(name: str, of_each_seed: Sequence[Floats]) -> dict[str, float]:
    """of_each_seed: the value, then those of the resamples"""
    mean = np.mean(of_each_seed, axis=0)
    low, high = interval(mean[1:])
    return {name: float(mean[0]), f"{name}_low": low, f"{name}_high": high}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _there(
    curve: Curve, curves: Sequence[Curve], texts: Corpus, side: str, budget: float
) -> dict[str, float | None]:
    """What else holds where the budget is used up. `random`: what random units do to the target at
    the same budget; `as_many_random`: what as many random units do."""
    losses_PG = topic_losses(texts, curve.sums_PD)
    hurt = damage(losses_PG, side)
    place, is_reached = place_at(hurt.benign_P, budget)
    count = at_place(curve.sizes_P, place)
    targets: list[float] = []
    alike: list[tuple[float, float]] = []
    for other in curves:
        is_control = other.method.startswith(RANDOM)
        if is_control and (other.model, other.seed, other.unit) == (
            curve.model,
            curve.seed,
            curve.unit,
        ):
            control = damage(topic_losses(texts, other.sums_PD), side)
            targets.append(at_place(control.target_P, place_at(control.benign_P, budget)[0]))
            if count <= other.sizes_P[-1]:
                both = (control.target_P, control.benign_P)
                target, benign = (float(np.interp(count, other.sizes_P, each)) for each in both)
                alike.append((target, benign))
    is_complete = len(alike) == len(targets) > 0
    return {
        "whole_target_loss": float(losses_PG[0, 0]),
        "whole_benign_loss": float(losses_PG[0, SIDES[side]].mean()),
        "reached": float(is_reached),
        "units": count,
        "share": at_place(curve.share_P, place),
        "target_active": at_place(curve.target_active_P, place),
        "benign_active": at_place(curve.benign_active_P, place),
        "worst": at_place(hurt.worst_P, place),
        "random": float(np.mean(targets)) if targets else None,
        "random_lowest": min(targets, default=None),
        "random_highest": max(targets, default=None),
        "as_many_random_target": float(np.mean([t for t, _ in alike])) if is_complete else None,
        "as_many_random_benign": float(np.mean([b for _, b in alike])) if is_complete else None,
    }


def points(curve: Curve, texts: Corpus) -> dict[str, Any]:
    """A curve as it is written down and drawn."""
    losses_PG = topic_losses(texts, curve.sums_PD)
    hurt = {side: damage(losses_PG, side) for side in SIDES}
    return {
        "model": curve.model,
        "seed": curve.seed,
        "unit": curve.unit,
        "method": curve.method,
        "units": list(curve.sizes_P),
        "share": _rounded(curve.share_P),
        "target_active": _rounded(curve.target_active_P),
        "benign_active": _rounded(curve.benign_active_P),
        "target": _rounded(hurt["held-out"].target_P),
        "benign": {side: _rounded(each.benign_P) for side, each in hurt.items()},
        "worst": {side: _rounded(each.worst_P) for side, each in hurt.items()},
        "loss_by_topic": {topic: _rounded(losses_PG[:, at]) for at, topic in enumerate(MEASURED)},
    }


def _rounded(values_P: Floats) -> list[float]:
    return [round(float(value), 5) for value in values_P]
