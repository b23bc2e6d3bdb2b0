"""Which rules apply to a request, which of them act on it, and which an exception holds back.

A pure function of a rule and of what is known of a request when it comes, so that every process that
asks, on every rank and offline, has the same answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Protocol

import numpy as np

from guard.policy.model import Mode, PolicyException, RequestMatch
from guard.program.program import Bools

MOST_KNOWN_FACTS = 1024
"""So many kinds of requests are remembered with the rules that apply to them."""

HASH_BITS = 64
"""A request's place in a sample is so many bits of a hash of its id."""


def utc_today() -> date:
    return datetime.now(UTC).date()


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What is known of a request when it comes, and does not change until it ends.

    request_id: the engine's own, the same on all ranks
    labels: from configured headers or API keys, or from the caller of an offline engine
    lora_adapter: its name; None for the base model
    today: the day, in UTC, on which the request came: exceptions are judged by it
    enforced: policies that the request asks to have enforced; other names have no effect
    """

    request_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    lora_adapter: str | None = None
    today: date = field(default_factory=utc_today)
    enforced: frozenset[str] = frozenset()


class MatchedRule(Protocol):
    """A compiled rule, as `ProgramRule` has it."""

    @property
    def policy(self) -> str: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def match(self) -> RequestMatch: ...
    @property
    def exceptions(self) -> tuple[PolicyException, ...]: ...


@dataclass(frozen=True, slots=True)
class RulesFor:
    """What a set's rules mean to one request.

    applies_R: the rule is evaluated; of one that is not there is no decision, mask or fail mode
    enforced_R: it applies and its action takes effect
    exempt_R: it applies, and an exception withholds its action
    """

    applies_R: Bools
    enforced_R: Bools
    exempt_R: Bools


def rules_for(rules: Sequence[MatchedRule], facts: RequestFacts) -> RulesFor:
    """rules: R of them, in deciding order, as `Program.rules`."""
    applies_R = np.ones(len(rules), dtype=np.bool_)
    enforced_R = np.zeros(len(rules), dtype=np.bool_)
    exempt_R = np.zeros(len(rules), dtype=np.bool_)
    for number, rule in enumerate(rules):
        if not (rule.match.is_all or matches(rule.match, facts)):
            applies_R[number] = False
            continue
        is_named = rule.policy in facts.enforced
        exempt_R[number] = not is_named and is_exempt(rule.exceptions, facts)
        enforced_R[number] = (is_named or rule.mode is Mode.ENFORCE) and not exempt_R[number]
    return RulesFor(applies_R, enforced_R, exempt_R)


class RulesByFacts:
    """`rules_for` of one set of rules, worked out once for requests that are alike."""

    def __init__(self, rules: Sequence[MatchedRule]) -> None:
        self.rules = rules
        self._known: dict[object, RulesFor] = {}
        matches_of = (
            [rule.match, *(exception.match for exception in rule.exceptions)] for rule in rules
        )
        self._by_id = any(
            match.sample < 1.0 or match.request_ids is not None
            for matches in matches_of
            for match in matches
        )

    def of(self, facts: RequestFacts) -> RulesFor:
        """Its arrays are not the caller's to write to."""
        if self._by_id:
            return rules_for(self.rules, facts)
        labels = tuple(sorted(facts.labels.items()))
        key = (facts.lora_adapter, facts.today, facts.enforced, labels)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST_KNOWN_FACTS:
                self._known.clear()
            found = self._known[key] = rules_for(self.rules, facts)
        return found


def is_exempt(exceptions: Iterable[PolicyException], facts: RequestFacts) -> bool:
    return any(
        not exception.is_expired(facts.today) and matches(exception.match, facts)
        for exception in exceptions
    )


def expired_exceptions(rules: Iterable[MatchedRule], today: date) -> list[str]:
    """One line for each exception that is not applied any more."""
    expired = {
        (rule.policy, exception.name): exception.until
        for rule in rules
        for exception in rule.exceptions
        if exception.is_expired(today)
    }
    return [
        f"the exception {policy}/{name} ended on {until} and is not applied; renew it, or take it out"
        for (policy, name), until in expired.items()
    ]


def matches(match: RequestMatch, facts: RequestFacts) -> bool:
    if match.lora_adapters is not None and facts.lora_adapter not in match.lora_adapters:
        return False
    if any(facts.labels.get(name) not in values for name, values in match.labels.items()):
        return False
    if match.request_ids is not None and client_ids(facts.request_id).isdisjoint(match.request_ids):
        return False
    return match.sample >= 1.0 or in_sample(facts.request_id, match.sample)


_RANDOM_END = re.compile(r"-[0-9a-f]{8}$")
_CHOICE = re.compile(r"^\d+_")
_PROMPT = re.compile(r"-\d+$")


def client_ids(request_id: str) -> frozenset[str]:
    """The names by which a client may know the engine's request: vLLM adds eight random digits behind,
    the number of a choice of several in front, and the completions API the number of a prompt."""
    plain = _RANDOM_END.sub("", request_id)
    of_choices = _CHOICE.sub("", plain)
    return frozenset((request_id, plain, of_choices, _PROMPT.sub("", of_choices)))


def in_sample(request_id: str, share: float) -> bool:
    """Whether a request is of a share of all; those of a smaller share are among those of a larger.

    The first 64 bits of SHA-256 of the id, as a fraction of 2^64, against the share.
    """
    digest = hashlib.sha256(request_id.encode(errors="surrogatepass")).digest()
    place = int.from_bytes(digest[: HASH_BITS // 8], "big")
    return place < share * 2.0**HASH_BITS  # Python compares a whole number with a float exactly
