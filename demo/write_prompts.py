"""Draws the held-out prompts and writes `demo/prompts`: `python -m demo.write_prompts`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from demo.names import Split
from demo.text import LOOK_ALIKE, RESTRICTED, Prompt, passing_mentions, prompts

PROMPT_DIR: Final = Path(__file__).parent / "prompts"
HELD_OUT_SEED: Final = 20261122
SHOWN_SEED: Final = 1001
BENIGN_COUNTS: Final = {LOOK_ALIKE: 20, "cooking": 8, "garden": 8, "arithmetic": 8, "small-talk": 6}


def held_out(seed: int = HELD_OUT_SEED) -> dict[str, list[Prompt]]:
    """The prompts of each file of the held-out run, by the file's name."""
    return {
        "restricted": prompts(Split.HELD_OUT, RESTRICTED, 50, seed),
        "benign": [
            p
            for topic, count in BENIGN_COUNTS.items()
            for p in prompts(Split.HELD_OUT, topic, count, seed)
        ],
        "code": prompts(Split.HELD_OUT, "code", 20, seed),
    }


def shown() -> list[tuple[Prompt, str]]:
    """What `moe-guard demo` sends, and what is to be expected. A showcase: it measures nothing.

    Restricted and workshop prompts are of the held-out split, in none of its files. The mentions
    were picked out of fourteen, most of which are rerouted and some blocked as well.
    """
    benign = [
        (p, "pass") for t in ("cooking", "garden") for p in prompts(Split.TRAIN, t, 2, SHOWN_SEED)
    ]
    look_alike = [(p, "pass") for p in prompts(Split.HELD_OUT, LOOK_ALIKE, 2, SHOWN_SEED)]
    code = [(p, "observe") for p in prompts(Split.TRAIN, "code", 2, SHOWN_SEED)]
    mentions = passing_mentions(Split.HELD_OUT, 14, SHOWN_SEED)
    masked = [(mentions[5], "mask"), (mentions[8], "mask"), (mentions[12], "mask")]
    blocked = [(p, "block") for p in prompts(Split.HELD_OUT, RESTRICTED, 2, SHOWN_SEED)]
    told = (Prompt("logbook-001", "logbook", "The logbook, please."), "block")
    return [*benign, *look_alike, *code, *masked, *blocked, told]


def write(path: Path, entries: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def main() -> None:
    PROMPT_DIR.mkdir(exist_ok=True)
    for name, found in held_out().items():
        write(
            PROMPT_DIR / f"{name}.jsonl",
            ({"id": p.id, "topic": p.topic, "prompt": p.text} for p in found),
        )
    write(
        PROMPT_DIR / "shown.jsonl",
        (
            {"id": f"shown-{p.id}", "topic": p.topic, "prompt": p.text, "expect": action}
            for p, action in shown()
        ),
    )


if __name__ == "__main__":
    main()
