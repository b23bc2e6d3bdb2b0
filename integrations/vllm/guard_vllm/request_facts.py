"""What the guard knows of a vLLM request: its id, adapter and labels, and what it asks to be enforced.

It travels in `sampling_params.extra_args`, which reaches the engine core and every worker. The engine
core adds the day on which the request came, so that no two processes read different clocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import date
from typing import Any

from guard.program.applicability import RequestFacts, RulesByFacts, RulesFor, utc_today

ENFORCE = "moe_guard_enforce"
LABELS = "moe_guard_labels"
DAY = "moe_guard_day"

_FACTS_ATTRIBUTE = "moe_guard_facts"
_RULES_ATTRIBUTE = "moe_guard_rules"


def facts_of(request_id: str, sampling_params: Any, lora_request: Any) -> RequestFacts:
    """The front end has checked names and labels."""
    extra_args: Mapping[str, Any] = getattr(sampling_params, "extra_args", None) or {}
    day = extra_args.get(DAY)
    return RequestFacts(
        request_id=request_id,
        labels=extra_args.get(LABELS) or {},
        lora_adapter=None if lora_request is None else lora_request.lora_name,
        today=utc_today() if day is None else date.fromisoformat(day),
        enforced=frozenset(extra_args.get(ENFORCE) or ()),
    )


def facts_of_request(request: Any) -> RequestFacts:
    """In the engine core, whose `Request` keeps them from when its first block is hashed on."""
    facts: RequestFacts | None = getattr(request, _FACTS_ATTRIBUTE, None)
    if facts is None:
        facts = facts_of(request.request_id, request.sampling_params, request.lora_request)
        setattr(request, _FACTS_ATTRIBUTE, facts)
    return facts


def send_day(request: Any) -> None:
    """Let the workers judge this request by the day that the engine core does."""
    if request.sampling_params is None:
        return
    params = copy.copy(request.sampling_params)  # other requests may have the same
    params.extra_args = {**(params.extra_args or {}), DAY: facts_of_request(request).today.isoformat()}
    request.sampling_params = params


def rules_of_request(request: Any, revision: str, rules: RulesByFacts) -> RulesFor:
    """In the engine core: what a set's rules mean to a request, kept with it until the set changes."""
    kept: tuple[str, RulesFor] | None = getattr(request, _RULES_ATTRIBUTE, None)
    if kept is None or kept[0] != revision:
        kept = (revision, rules.of(facts_of_request(request)))
        setattr(request, _RULES_ATTRIBUTE, kept)
    return kept[1]
