"""Overrides as they lie in a file and travel over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Final

import msgspec

from guard.errors import GuardError
from guard.policy.model import MaskMethod, Mode
from guard.policy.suggest import one_of, quote

OPERATOR: Final = "operator"
"""The policy that an operator's masks are of, in metrics and in the decision log."""

MAX_MASKS: Final = 64
MAX_EXPERTS: Final = 4096
MAX_TEXT: Final = 500
LONGEST: Final = timedelta(days=90)

_EXPERT: Final = re.compile(r"L(\d{1,5})/E(\d{1,6})(?:-(\d{1,6}))?", re.IGNORECASE)
_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.IGNORECASE)


class OverrideError(GuardError):
    """What an operator asks for makes no sense."""


class NotThereError(OverrideError):
    """A mask, or a policy, that there is none of."""


class OperatorMask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Experts that are out of use, whatever the policies say.

    id: mask-1 and on; free numbers are given out again, so that metrics stay bounded
    experts: (the model's own layer number, logical expert id)
    labels: of the requests that it holds for; empty: all. request: the id of the one that it holds for
    by, reason: who, and why
    created, until: seconds since 1970, UTC; until None: until somebody lifts it
    """

    id: str
    experts: tuple[tuple[int, int], ...]
    by: str
    reason: str
    created: float
    until: float | None = None
    method: str = MaskMethod.REROUTE.value
    labels: dict[str, str] = {}
    request: str = ""

    def is_over(self, now: float) -> bool:
        return self.until is not None and self.until <= now


class Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """modes: by policy, in the place of the one that is written

    kill_switch: every policy that enforces, and every mask here, only observes
    """

    masks: tuple[OperatorMask, ...] = ()
    modes: dict[str, str] = {}
    kill_switch: bool = False

    def without_expired(self, now: float) -> Overrides:
        kept = tuple(mask for mask in self.masks if not mask.is_over(now))
        return self if len(kept) == len(self.masks) else msgspec.structs.replace(self, masks=kept)

    def next_end(self) -> float | None:
        """When the first mask ends, in seconds since 1970."""
        return min((mask.until for mask in self.masks if mask.until is not None), default=None)

    def with_mask(
        self,
        experts: Iterable[tuple[int, int]],
        *,
        by: str,
        reason: str,
        lasts: timedelta | None = None,
        method: str = MaskMethod.REROUTE.value,
        labels: Mapping[str, str] | None = None,
        request: str = "",
        now: float | None = None,
    ) -> tuple[Overrides, OperatorMask]:
        """Raises OverrideError."""
        now = time.time() if now is None else now
        named = tuple(sorted(set(experts)))
        if not named:
            raise OverrideError("a mask names one expert at least, such as L12/E85")
        if len(named) > MAX_EXPERTS:
            raise OverrideError(f"a mask names {MAX_EXPERTS} experts at most, not {len(named)}")
        if not reason.strip():
            raise OverrideError("a mask needs a reason: people will ask")
        if len(reason) > MAX_TEXT:
            raise OverrideError(f"a reason has {MAX_TEXT} characters at most")
        if labels and request:
            raise OverrideError("a mask is for labels or for one request, not for both")
        methods = [one.value for one in MaskMethod if one is not MaskMethod.FORCE]
        if method not in methods:
            raise OverrideError(f"the method is {one_of(methods)}, not {quote(method)}")
        if lasts is not None and not timedelta(0) < lasts <= LONGEST:
            raise OverrideError(f"a mask lasts for up to {LONGEST.days} days; leave it out for no end")
        taken = {mask.id for mask in self.masks}
        free = (f"mask-{number}" for number in range(1, MAX_MASKS + 1))
        number = next((one for one in free if one not in taken), None)
        if number is None:
            raise OverrideError(f"there are {MAX_MASKS} masks already; lift one first")
        mask = OperatorMask(
            id=number,
            experts=named,
            by=by,
            reason=reason.strip(),
            created=now,
            until=None if lasts is None else now + lasts.total_seconds(),
            method=method,
            labels=dict(labels or {}),
            request=request,
        )
        return msgspec.structs.replace(self, masks=(*self.masks, mask)), mask

    def without_mask(self, mask_id: str) -> Overrides:
        """Raises NotThereError where there is none of that id."""
        kept = tuple(mask for mask in self.masks if mask.id != mask_id)
        if len(kept) == len(self.masks):
            known = [mask.id for mask in self.masks]
            hint = f"there is {one_of(known, 'and')}" if known else "there is none"
            raise NotThereError(f"no mask is called {quote(mask_id)}; {hint}")
        return msgspec.structs.replace(self, masks=kept)

    def with_mode(self, policy: str, mode: str | None) -> Overrides:
        """mode: None: the one that is written. Raises OverrideError for a word that is no mode."""
        modes = {name: word for name, word in self.modes.items() if name != policy}
        if mode is not None:
            words = [one.value for one in Mode]
            if mode not in words:
                raise OverrideError(f"a mode is {one_of(words)}, not {quote(mode)}")
            modes[policy] = mode
        return msgspec.structs.replace(self, modes=modes)


def parse_experts(texts: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """L12/E85 and L12/E90-95. Raises OverrideError."""
    found: set[tuple[int, int]] = set()
    for text in texts:
        match = _EXPERT.fullmatch(text.strip())
        if match is None:
            raise OverrideError(f"{quote(text)} names no expert; write L12/E85 or L12/E90-95")
        layer, first, last = (int(part) if part else None for part in match.groups())
        assert layer is not None
        assert first is not None
        last = first if last is None else last
        if not first <= last < first + MAX_EXPERTS:
            raise OverrideError(f"{quote(text)} is no range of up to {MAX_EXPERTS} experts")
        found.update((layer, expert) for expert in range(first, last + 1))
    return tuple(sorted(found))


def parse_duration(text: str) -> timedelta:
    """2h, 90m, 1d12h, 30s. Raises OverrideError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise OverrideError(f"{quote(text)} is no duration; write 2h, 90m or 1d12h")
    days, hours, minutes, seconds = (min(int(part or 0), 10**6) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
