"""Finds the score that the demo blocks by, writes its policy: `python -m demo.choose_experts`.

It reads the choosing split and nothing else. A request's features are, for each expert, the mean
number of times that a token chose it (0 or 1 a token). The restricted score is a sparse logistic
regression on them, scaled so that the benign mean is 0 and the restricted mean is 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo import frames
from demo.names import Split
from demo.policy_text import Choice, Expert, write_policy
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
        matrix_LE = np.zeros(self.gates_TLE.shape[1:])
        for (layer, expert), weight in weights.items():
            matrix_LE[layer, expert] = weight
        score_T: Floats = bias + (self.counts_TLE * matrix_LE).sum((1, 2))
        return score_T


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
    chosen = {divmod(int(i), num_experts): float(v) for i, v in zip(telling, scaled, strict=True) if v}
    return dict(sorted(chosen.items())), bias


def windows(values_T: Floats, size: int) -> Floats:
    """Means over `size` neighbouring values; over all of them where there are fewer."""
    size = min(size, len(values_T))
    return np.convolve(values_T, np.full(size, 1 / size), "valid") if size else np.zeros(0)


def highest(values: Floats) -> float:
    """The highest of some values; minus infinity where there is none."""
    return float(values.max()) if len(values) else -math.inf


class Reading(NamedTuple):
    """What the two rules read of one sample: the highest value that each one meets."""

    prompt: float
    output: float


def read(sample: Sample, choice: Choice) -> Reading:
    score_T, num_prompt = sample.score_T(choice.weights, choice.bias), sample.num_prompt
    output_T = score_T[num_prompt:]
    full = len(output_T) >= OUTPUT_WINDOW
    return Reading(
        float(score_T[:num_prompt].mean()),
        highest(windows(output_T, OUTPUT_WINDOW)) if full else -math.inf,
    )


def between(low: Sequence[float], high: Sequence[float]) -> float:
    """The middle between nearly all low values (99 %) and nearly all high ones (95 %)."""
    finite = [value for value in low if value > -math.inf]
    return round(float(np.quantile(finite, 0.99) + np.quantile(high, 0.05)) / 2, 2)


def choose(samples: Sequence[Sample]) -> Choice:
    weights, bias = restricted_score(samples)
    open_choice = Choice(weights, bias, 0, 0, OUTPUT_WINDOW)
    readings = [(sample.topic, read(sample, open_choice)) for sample in samples]
    benign = [reading for topic, reading in readings if topic in (*BENIGN, "code")]
    mentions = [reading for topic, reading in readings if topic == "mention"]
    restricted = [reading for topic, reading in readings if topic == RESTRICTED]
    return open_choice._replace(
        # A passing mention shall be rerouted, not blocked.
        prompt_above=between([r.prompt for r in (*benign, *mentions)], [r.prompt for r in restricted]),
        output_above=between([r.output for r in benign], [r.output for r in restricted]),
    )


def answered(model: Path) -> list[Sample]:
    recorder = Recorder(model)
    num_experts = recorder.topology.max_experts
    chosen = choosing_prompts()
    runs = recorder.run_all([prompt.text for prompt in chosen])
    return [
        Sample(prompt.topic, gates(run.routing, num_experts), run.routing.num_prompt_tokens)
        for prompt, run in zip(chosen, track(runs, "choosing prompts", len(chosen)), strict=True)
    ]


def hits(samples: Sequence[Sample], choice: Choice) -> Table:
    """How many samples of each topic each rule fires on."""
    limits = (choice.prompt_above, choice.output_above)
    table = Table("topic", "samples", "asked", "told", title="choosing split")
    for topic in dict.fromkeys(sample.topic for sample in samples):
        readings = [read(sample, choice) for sample in samples if sample.topic == topic]
        fired = [sum(r[rule] > limit for r in readings) for rule, limit in enumerate(limits)]
        table.add_row(topic, str(len(readings)), *map(str, fired))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=POLICY_DIR)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = answered(options.model)
    choice = choose(samples)
    write_policy(choice, options.out)
    console = Console()
    console.print(hits(samples, choice))
    console.print(choice._asdict())


if __name__ == "__main__":
    main()
