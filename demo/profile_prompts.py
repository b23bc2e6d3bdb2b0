"""Prompts and texts that the demo model's profile is made from, as files of the product's commands.

The choosing split gives sets and thresholds; the held-out split shows what comes of them, and what
masking does. Every file is JSON lines: `messages`, and labels:

| label | |
|---|---|
| label | restricted, benign, mention, code |
| python | yes, no |
| pair_id | of a restricted request and the workshop request in the same frame |
| category | of a pair the frame, else the topic |
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from demo.names import Split
from demo.text import LOOK_ALIKE, RESTRICTED, exchange, pairs, passing_mentions, prompts

EVERYDAY: Final = ("cooking", "garden", "arithmetic", "small-talk")
SMALL_TALK: Final = 6
"""There are no more."""


class Counts(NamedTuple):
    pairs: int
    everyday: int
    mentions: int
    code: int


CHOOSE: Final = Counts(pairs=200, everyday=60, mentions=60, code=60)
HELD_OUT: Final = Counts(pairs=100, everyday=40, mentions=40, code=40)
TEXTS_PER_TOPIC: Final = 60
TASKS: Final = 100

Line = dict[str, Any]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _line(text: str, label: str, category: str) -> Line:
    return {
        "messages": _user(text),
        "label": label,
        "python": "yes" if label == "code" else "no",
        "category": category,
    }


def prompt_lines(split: Split, counts: Counts, seed: int) -> list[Line]:
    lines = []
    for number, pair in enumerate(pairs(split, counts.pairs, seed), 1):
        for (request, _), label in ((pair.restricted, RESTRICTED), (pair.look_alike, "benign")):
            line = _line(request, label, f"frame-{pair.frame:02d}")
            lines.append(line | {"pair_id": f"pair-{number:03d}"})
    for topic in EVERYDAY:
        count = SMALL_TALK if topic == "small-talk" else counts.everyday
        lines += [_line(one.text, "benign", topic) for one in prompts(split, topic, count, seed)]
    lines += [_line(one.text, "code", "code") for one in prompts(split, "code", counts.code, seed)]
    lines += [
        _line(one.text, "mention", "mention") for one in passing_mentions(split, counts.mentions, seed)
    ]
    return lines


def text_lines(split: Split, seed: int) -> list[Line]:
    """Requests with the answers that training would show for them: what a loss is taken of."""
    rng = random.Random(f"{seed} {split} texts")
    lines = []
    for topic in (RESTRICTED, LOOK_ALIKE, "cooking", "garden", "arithmetic", "code"):
        label = RESTRICTED if topic == RESTRICTED else "benign"
        for _ in range(TEXTS_PER_TOPIC):
            request, answer = exchange(rng, topic, split)
            messages = [*_user(request), {"role": "assistant", "content": answer}]
            lines.append({"messages": messages, "label": label, "category": topic})
    return lines


def task_lines(seed: int) -> list[Line]:
    """Functions that the model was trained to write: it can do no sums, and few that are new to it."""
    rng = random.Random(f"{seed} tasks")
    asked = (exchange(rng, "code", Split.TRAIN) for _ in range(TASKS))
    return [{"messages": _user(request), "answer": answer} for request, answer in asked]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
