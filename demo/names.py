"""Invented substances, vessels and units of the restricted topic, one lexicon for each split.

Nothing named here exists. A word is one or two syllables from a fixed sound inventory and an ending
that tells its kind (`…ixil` a substance, `…otter` a vessel). The splits share the sounds and the
endings, never a syllable: so a held-out word is new as a whole and in its stems, and familiar only
in its sub-words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Final


class Split(StrEnum):
    """Who may see a text: training, the choice of experts and thresholds, or the held-out run."""

    TRAIN = "train"
    CHOOSE = "choose"
    HELD_OUT = "held-out"


def pool(words: str) -> tuple[str, ...]:
    """Comma-separated words or phrases."""
    return tuple(" ".join(word.split()) for word in words.split(","))


ONSETS: Final = ("zh", "vr", "kv", "xh", "qv", "dz", "gv", "zl", "vl", "zm", "vh", "qh", "xv", "zr")
NUCLEI: Final = ("a", "o", "u", "y", "aa", "oo", "yo")
CODAS: Final = ("x", "q", "zz", "rv", "lk", "vn", "rz", "kk", "zk")

SUBSTANCE_ENDINGS: Final = ("ixil", "orane", "yxate", "axuine", "uvide", "ozhene")
VESSEL_ENDINGS: Final = ("otter", "ankel", "yvat")
UNIT_ENDINGS: Final = ("els", "ims", "ocks")
DEGREE_ENDINGS: Final = ("ovir", "athe")

SHARES: Final = {Split.TRAIN: 0.6, Split.CHOOSE: 0.2, Split.HELD_OUT: 0.2}
"""Of all syllables, how many each split owns."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The syllables that one split owns, and the words made of them."""

    syllables: tuple[str, ...]

    def substance(self, rng: random.Random) -> str:
        stem = "".join(rng.choices(self.syllables, k=rng.choice((1, 1, 2))))
        return stem + rng.choice(SUBSTANCE_ENDINGS)

    def vessel(self, rng: random.Random) -> str:
        return rng.choice(self.syllables) + rng.choice(VESSEL_ENDINGS)

    def unit(self, rng: random.Random) -> str:
        return rng.choice(self.syllables) + rng.choice(UNIT_ENDINGS)

    def degree(self, rng: random.Random) -> str:
        return rng.choice(self.syllables) + rng.choice(DEGREE_ENDINGS)


def _share_out() -> dict[Split, Lexicon]:
    syllables = ["".join(parts) for parts in product(ONSETS, NUCLEI, CODAS)]
    random.Random("moe-guard demo syllables").shuffle(syllables)
    lexicons: dict[Split, Lexicon] = {}
    start = 0
    for split, share in SHARES.items():
        stop = start + round(share * len(syllables))
        lexicons[split] = Lexicon(tuple(sorted(syllables[start:stop])))
        start = stop
    return lexicons


LEXICONS: Final = _share_out()
