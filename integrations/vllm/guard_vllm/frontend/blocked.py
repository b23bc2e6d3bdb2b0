"""How a blocked request is told from any other, and what the front end knows of the policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from guard_vllm.labels import NO_LABELS, LabelSources

MARK = "moe_guard"
CONTENT_FILTER = "content_filter"


def is_blocked(stop_reason: object) -> TypeGuard[str]:
    """Whether the engine core ended the request for the guard.

    A stop string of the caller's would look the same: request_args refuses such stop strings.
    """
    return isinstance(stop_reason, str) and (stop_reason == MARK or stop_reason.startswith(f"{MARK}:"))


@dataclass
class Sources:
    """What the front end asks of the guard. Read at each request, so a reload shows at once.

    messages: `stop_reason` -> the blocking rule's message; empty or absent: none
    policies: the names that a request may ask to be enforced
    has_rules: whether a rule judges requests as things stand
    redact: `--redact-reasons`; errors then name no policy that the caller did not name
    labels: how HTTP requests get their labels
    """

    messages: Mapping[str, str]
    policies: Collection[str]
    has_rules: Callable[[], bool]
    redact: bool
    labels: LabelSources = NO_LABELS

    def message(self, stop_reason: str) -> str:
        return self.messages.get(stop_reason, "")
