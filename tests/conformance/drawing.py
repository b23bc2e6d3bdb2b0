"""Draws that are cheap, one integer standing for many choices, and what they choose from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from hypothesis import strategies as st

GATE_NUMERATORS = (64, 128, 64, 77)  # over 256
WEIGHTS = (1.0, 0.5, 0.1, 0.2, 0.3, -0.1, -0.25, 0.07, 0.33, -1.0, 2.0)
SPREADING_PRIME = 2_654_435_761
ONE_IN_FOUR = (False, False, False, True)

T = TypeVar("T")


def pick(draw: st.DrawFn, items: Iterable[T]) -> T:
    """One of the items. `sampled_from` would build and check a strategy for every draw."""
    choices = list(items)
    return choices[draw(st.integers(0, len(choices) - 1))]


def digits(draw: st.DrawFn, bases: Sequence[int]) -> list[int]:
    """Numbers 0 <= n < base for each base, all out of one draw.

    Hypothesis prefers small integers, which would leave the last digits 0: a prime spreads them.
    """
    limit = math.prod(bases)
    assert limit < SPREADING_PRIME
    code, digits = draw(st.integers(0, limit - 1)) * SPREADING_PRIME % limit, []
    for base in bases:
        code, digit = divmod(code, base)
        digits.append(digit)
    return digits


def subset(draw: st.DrawFn, items: Sequence[T]) -> list[T]:
    """Some of the items, at least one, in their order, out of one draw."""
    bits = draw(st.integers(1, 2 ** len(items) - 1))
    return [item for n, item in enumerate(items) if bits >> n & 1]
