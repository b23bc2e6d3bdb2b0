"""A new policy set takes effect in the engines that this process speaks with, between two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.policy import PolicySet


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """What became of a policy set.

    revision: what is in force now: of this set, or where it was refused, of the one before
    fault: why it was refused, for people; None where it is in force
    """

    revision: str
    fault: str | None = None

    @property
    def is_in_force(self) -> bool:
        return self.fault is None


class Reloader:
    """One a process that speaks with engines; in a server, the first API server's.

    Every attempt counts in `moe_guard_reloads_total` and is logged.
    """

    def apply(self, load: Callable[[], PolicySet]) -> ReloadResult:
        """Load a policy set and put it in force; what cannot be loaded or not be honoured is refused,
        and the one before stays. Waits until all engines have it: never call it on the event loop.

        Safe to call from any thread; one call after the other takes effect.

        load: called once, in this thread; a PolicyError of it is a refusal like any other
        """
        raise NotImplementedError


def reloader() -> Reloader | None:
    """This process's, once its engines are up; None where none was guarded, or it is another's task."""
    return None


def reload_policies(llm: Any, path: Path | str) -> ReloadResult:
    """Put the policies at `path` in force in a vLLM `LLM` of this process, running requests included.

    Call it from the thread that uses the `LLM`, between two of its steps.
    """
    raise NotImplementedError
