"""A bounded sample of many numbers."""

from __future__ import annotations

import random
from typing import Final

SAMPLE_SIZE: Final = 10_000


class Sample:
    """Of any number of numbers, up to so many of them, each as likely as another; the same each time.

    kept: in no order
    """

    def __init__(self, size: int = SAMPLE_SIZE) -> None:
        self.kept: list[float] = []
        self._size = size
        self._seen = 0
        self._random = random.Random(0)

    def add(self, number: float) -> None:
        self._seen += 1
        if len(self.kept) < self._size:
            self.kept.append(number)
            return
        place = self._random.randrange(self._seen)
        if place < self._size:
            self.kept[place] = number
