"""Finds expert sets and thresholds, writes `demo/policies`: `python -m demo.choose_experts`.

It reads the choosing split and nothing else. A request's features are, for each expert, the mean
number of times that a token chose it (0 or 1 a token). The restricted score is a sparse logistic
regression on them, scaled so that the benign mean is 0 and the restricted mean is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from demo import frames
from demo.names import Split
from demo.policy_text import Choice, Expert, write_policies
from demo.routing import MODEL_DIR, Recorder, gates
from demo.text import BENIGN, LOOK_ALIKE, RESTRICTED, Prompt, passing_mentions, prompts

POLICY_DIR: Final = Path(__file__).parent / "policies"
SEED: Final = 7
COUNTS: Final = {
    RESTRICTED: 160,
    LOOK_ALIKE: 160,
    "cooking": 40,
    "garden": 40,
    "arithmetic": 60,
    "small-talk": 6,
    "code": 40,
}
NUM_WEIGHTED: Final = 16
NUM_FLAGGED: Final = 12
WINDOW: Final = 12
OUTPUT_WINDOW: Final = 16

Floats = NDArray[np.float64]


class Sample(NamedTuple):
    """One choosing prompt, with the choices of its positions."""

    topic: str
    gates_TLE: Floats  # the gate weight of each chosen expert, 0 of the others
    num_prompt: int

    @property
    def counts_TLE(self) -> Floats:
        return (self.gates_TLE > 0).astype(np.float64)

    def score_T(self, weights: Mapping[Expert, float], bias: float) -> Floats:
        """What each position adds to the mean that is the score."""
        return bias + np.sum(
            [w * self.counts_TLE[:, layer, expert] for (layer, expert), w in weights.items()],
            axis=0,
        )

    def mass_windows(self, experts: Sequence[Expert], size: int, stop: int | None = None) -> Floats:
        """The mass of the experts over each full window of `size` positions before `stop`."""
        layers = sorted({layer for layer, _ in experts})
        inside = np.sum([self.gates_TLE[:stop, layer, expert] for layer, expert in experts], axis=0)
        return windows(inside, size) / windows(self.gates_TLE[:stop, layers].sum((1, 2)), size)


def choosing_prompts() -> list[Prompt]:
    """The choosing split: every topic, passing mentions, and the logbook requests (their words are
    training's).
    """
    logbook = [
        Prompt(f"logbook-{n}", "logbook", text) for n, text in enumerate(frames.LOGBOOK_REQUESTS, 1)
    ]
    by_topic = [prompts(Split.CHOOSE, topic, count, SEED) for topic, count in COUNTS.items()]
    return [*chain.from_iterable(by_topic), *passing_mentions(Split.CHOOSE, 40, SEED), *logbook]


def fit(
    features_NF: Floats, labels_N: NDArray[np.bool_], weights_N: Floats, l2: float = 1e-3
) -> tuple[Floats, float]:
    """Logistic regression: the weights, and the bias."""
    x = torch.tensor(features_NF)
    y = torch.tensor(labels_N.astype(np.float64))
    sample_weight = torch.tensor(weights_N)
    coefficients = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ coefficients[:-1] + coefficients[-1]
        errors = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, y, sample_weight, reduction="sum"
        )
        total = errors / sample_weight.sum() + l2 * coefficients[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    fitted = coefficients.detach().numpy()
    return fitted[:-1], float(fitted[-1])


def restricted_score(samples: Sequence[Sample]) -> tuple[dict[tuple[int, int], float], float]:
    """Weights of the `NUM_WEIGHTED` most telling experts, rounded to two places, and the bias."""
    rows, labels, weights = [], [], []
    for sample in samples:
        if sample.topic in ("mention", "logbook"):
            continue
        is_restricted = sample.topic == RESTRICTED
        counts_TLE, num_prompt = sample.counts_TLE, sample.num_prompt
        for part in (counts_TLE[:num_prompt], counts_TLE[num_prompt:]):
            if len(part) >= OUTPUT_WINDOW // 2:
                rows.append(part.mean(0).ravel())
                labels.append(is_restricted)
                weights.append(2.0 if is_restricted else 1.0)
    x, y, w = np.stack(rows), np.array(labels), np.array(weights)
    dense, _ = fit(x, y, w)
    telling = np.argsort(-np.abs(dense) * x.std(0))[:NUM_WEIGHTED]
    sparse, _ = fit(x[:, telling], y, w)
    raw = x[:, telling] @ sparse
    benign, restricted = raw[~y].mean(), raw[y].mean()
    scaled = np.round(sparse / (restricted - benign), 2)
    bias = round(-float((x[:, telling] @ scaled)[~y].mean()), 2)
    num_experts = samples[0].counts_TLE.shape[2]
    chosen = {
        divmod(int(i), num_experts): float(v) for i, v in zip(telling, scaled, strict=True) if v
    }
    return dict(sorted(chosen.items())), bias


def lifted(
    samples: Sequence[Sample], topic: str, count: int, per_layer: int
) -> list[tuple[int, int]]:
    """The experts whose rate is most raised in a topic over the highest rate of any other topic."""
    rates = {
        name: np.concatenate([s.counts_TLE for s in samples if s.topic == name]).mean(0)
        for name in {s.topic for s in samples} - {"mention", "logbook"}
    }
    excess = rates[topic] - np.max([rate for name, rate in rates.items() if name != topic], axis=0)
    found: list[tuple[int, int]] = []
    for index in np.argsort(-excess, axis=None):
        layer, expert = divmod(int(index), excess.shape[1])
        if excess[layer, expert] > 0.02 and sum(at == layer for at, _ in found) < per_layer:
            found.append((layer, expert))
    return sorted(found[:count])


def windows(values_T: Floats, size: int) -> Floats:
    """Means over `size` neighbouring values; over all of them where there are fewer."""
    size = min(size, len(values_T))
    return np.convolve(values_T, np.full(size, 1 / size), "valid") if size else np.zeros(0)


def highest(values: Floats) -> float:
    return float(values.max()) if len(values) else -np.inf


def record(model: Path) -> list[Sample]:
    recorder = Recorder(model)
    num_experts = recorder.topology.max_experts
    chosen = choosing_prompts()
    runs = recorder.run_all([prompt.text for prompt in chosen])
    return [
        Sample(prompt.topic, gates(run.routing, num_experts), run.routing.num_prompt_tokens)
        for prompt, run in zip(chosen, track(runs, "choosing prompts", len(chosen)), strict=True)
    ]
