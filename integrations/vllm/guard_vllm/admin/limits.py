"""How often callers of `/guard/v1` may fail to say who they are, and how often they may change things.

A limit is one number a caller: the time at which all that it took would have come due at the steady
rate (the generic cell rate algorithm). Of callers the latest are remembered, so memory is bounded.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

MAX_CALLERS: Final = 4096
"""That a limit remembers. Who is forgotten begins anew; what all take together is counted apart."""

_MAX_NAME_CHARACTERS: Final = 64
_V6_PREFIX_BITS: Final = 64
"""What one subscriber is given whole."""


@dataclass(frozen=True, slots=True)
class Rate:
    """`burst` at once, and one more every `every_s`."""

    burst: int
    every_s: float


FAILURES_EACH: Final = Rate(burst=10, every_s=10.0)
FAILURES_ALL: Final = Rate(burst=100, every_s=1.0)
CHANGES_EACH: Final = Rate(burst=60, every_s=1.0)
CHANGES_ALL: Final = Rate(burst=120, every_s=0.5)


class RateLimit:
    """Of each caller on its own. Not safe to call from several threads."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._due: OrderedDict[str, float] = OrderedDict()  # the one used longest ago comes first

    def wait_s(self, caller: str = "") -> float:
        """How long until it may take one; 0 where it may now."""
        now, spare_s = self._clock(), (self._rate.burst - 1) * self._rate.every_s
        return max(self._due.get(caller, now) - now - spare_s, 0.0)

    def take(self, caller: str = "") -> float:
        """Takes one where it may; how long until it may, else."""
        if wait := self.wait_s(caller):
            return wait
        self._due[caller] = max(self._due.get(caller, 0.0), self._clock()) + self._rate.every_s
        self._due.move_to_end(caller)
        if len(self._due) > MAX_CALLERS:
            self._due.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._due)


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """Of one API server's process; used on its event loop."""

    failures_each: RateLimit = field(default_factory=lambda: RateLimit(FAILURES_EACH))
    failures_all: RateLimit = field(default_factory=lambda: RateLimit(FAILURES_ALL))
    changes_each: RateLimit = field(default_factory=lambda: RateLimit(CHANGES_EACH))
    changes_all: RateLimit = field(default_factory=lambda: RateLimit(CHANGES_ALL))

    def guess_wait_s(self, caller: str) -> float:
        """How long the caller may not try a key at all, right or wrong: else it would guess on."""
        return self.failures_each.wait_s(caller)

    def fail(self, caller: str) -> float:
        """It gave a wrong key. 0: tell it so; else how long to be silent about it."""
        return self.failures_each.take(caller) or self.failures_all.take()

    def change(self, caller: str, *, is_urgent: bool) -> float:
        """is_urgent: only its own changes hold it up, not everybody's"""
        return self.changes_each.take(caller) or (0.0 if is_urgent else self.changes_all.take())


def caller_of(client: tuple[str, int] | None) -> str:
    """The address that is counted: of IPv6 the network that one subscriber has.

    client: as ASGI has it, behind a trusted proxy the address that it forwards
    """
    host = "" if client is None else client[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a Unix socket, or whatever a proxy forwards
        return ascii(host[:_MAX_NAME_CHARACTERS])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _V6_PREFIX_BITS), strict=False))
