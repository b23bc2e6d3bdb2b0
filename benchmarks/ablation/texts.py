"""Requests with their answers, of one split, and what a model loses on the answers.

Shapes: D documents, B documents of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo.names import Split
from demo.text import LOOK_ALIKE, RESTRICTED, Document, exchange
from demo.tokens import ROLES, encode

TARGET: Final = RESTRICTED
BENIGN: Final = (LOOK_ALIKE, "cooking", "garden", "arithmetic", "code")
"""Small talk is left out: it has no answers but those of training."""

FAMILIAR: Final = tuple(f"{topic}, familiar" for topic in BENIGN)
"""The same topics, drawn anew from training's own frames and words, which the model is good at; short
ones may have occurred in training. Held-out words it has never met: there its loss is high, and may
even fall while it is damaged."""

COUNTS: Final = {
    Split.CHOOSE: {TARGET: 80, LOOK_ALIKE: 60, **dict.fromkeys(BENIGN[1:], 30)},
    Split.HELD_OUT: {
        TARGET: 60,
        LOOK_ALIKE: 40,
        **dict.fromkeys(BENIGN[1:], 25),
        **dict.fromkeys(FAMILIAR, 20),
    },
}
SEED: Final = 31
BATCH: Final = 32

Floats = NDArray[np.float64]


class Batch(NamedTuple):
    """Documents of like length, padded at the end, where a causal model does not see it."""

    ids_BT: Tensor
    is_real_BT: Tensor
    is_answer_BT: Tensor
    documents_B: Tensor  # their numbers in the corpus


@dataclass(frozen=True, slots=True)
class Corpus:
    """One split's documents. topics: of each one; answer_tokens_D: how many of its losses count"""

    split: Split
    topics: tuple[str, ...]
    texts: tuple[str, ...]
    answer_tokens_D: Floats
    batches: tuple[Batch, ...]

    def members(self, topic: str) -> NDArray[np.intp]:
        return np.flatnonzero(np.array(self.topics) == topic)


def corpus(
    split: Split, tokenizer: PreTrainedTokenizerFast, counts: Mapping[str, int] | None = None
) -> Corpus:
    """Documents that are all different, drawn from the split's own sentence frames and words; from
    training's where a topic is a familiar one."""
    drawn: list[Document] = []
    for topic, count in (counts or COUNTS[split]).items():
        rng = random.Random(f"{SEED} {split} {topic} answered")
        source = Split.TRAIN if topic in FAMILIAR else split
        drawn_topic = topic.removesuffix(", familiar")
        found: dict[tuple[str, str], None] = {}
        while len(found) < count:
            found.setdefault(exchange(rng, drawn_topic, source))
        drawn += [Document(topic, turns) for turns in found]
    rows = [torch.tensor(encode(tokenizer, document)) for document in drawn]
    answer_sign = tokenizer.convert_tokens_to_ids(ROLES[2])
    starts = [int((row == answer_sign).nonzero()[-1]) + 1 for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    return Corpus(
        split,
        tuple(document.topic for document in drawn),
        tuple(" ".join(document.turns) for document in drawn),
        np.array([len(row) - start for row, start in zip(rows, starts, strict=True)], np.float64),
        tuple(
            _batch(rows, starts, order[first : first + BATCH], tokenizer.pad_token_id)
            for first in range(0, len(order), BATCH)
        ),
    )


def _batch(rows: list[Tensor], starts: list[int], numbers: list[int], pad: int) -> Batch:
    ids_BT = torch.nn.utils.rnn.pad_sequence([rows[n] for n in numbers], True, float(pad))
    positions_T = torch.arange(ids_BT.shape[1])
    is_real_BT = positions_T < torch.tensor([len(rows[n]) for n in numbers])[:, None]
    is_answer_BT = is_real_BT & (positions_T >= torch.tensor([starts[n] for n in numbers])[:, None])
    return Batch(ids_BT, is_real_BT, is_answer_BT, torch.tensor(numbers))


def loss_sums_B(model: Any, batch: Batch) -> Tensor:
    """The cross-entropy of each document's answer, summed over its tokens, in nats."""
    states_BTH = model.model(batch.ids_BT, use_cache=False).last_hidden_state
    asked_BT = batch.is_answer_BT[:, 1:]
    logits = model.lm_head(states_BTH[:, :-1][asked_BT])
    losses = torch.nn.functional.cross_entropy(logits, batch.ids_BT[:, 1:][asked_BT], reduction="none")
    owners = asked_BT.nonzero()[:, 0]
    return losses.new_zeros(len(asked_BT)).index_add(0, owners, losses)


@torch.no_grad()
def loss_sums_D(model: Any, texts: Corpus) -> Floats:
    sums_D = np.zeros(len(texts.topics))
    for batch in texts.batches:
        sums_D[batch.documents_B.numpy()] = loss_sums_B(model, batch).double().numpy()
    return sums_D


def by_topic(texts: Corpus) -> Iterator[tuple[str, Batch]]:
    """Every batch, in parts that have one topic each."""
    for batch in texts.batches:
        topics = [texts.topics[number] for number in batch.documents_B.tolist()]
        for topic in dict.fromkeys(topics):
            rows = torch.tensor([at for at, other in enumerate(topics) if other == topic])
            yield topic, Batch(*(part[rows] for part in batch))
