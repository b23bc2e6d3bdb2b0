"""Ports for what a test starts."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000
"""Below the ports that Linux gives to connections and to whoever binds port 0: nobody takes one of
these by chance between the look and the start."""

_TRIES = 100


def free_port(*, in_a_row: int = 1) -> int:
    """The first of so many free ports: vLLM's data-parallel engines take those behind the one that they
    are given."""
    for _ in range(_TRIES):
        first = random.SystemRandom().randrange(_FIRST, _LAST - in_a_row)
        if all(_is_free(port) for port in range(first, first + in_a_row)):
            return first
    raise RuntimeError(f"no {in_a_row} free ports in a row between {_FIRST} and {_LAST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
