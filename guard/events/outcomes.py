"""The most that happened to each request that has not ended, and the blocks that are owed to some."""

from __future__ import annotations

from collections.abc import Iterable

from guard.events.message import RuleFacts

OUTCOMES = ("passed", "observed", "unjudged", "masked", "blocked")
_RANK = {outcome: rank for rank, outcome in enumerate(OUTCOMES)}


class Outcomes:
    """
    owed: the rule for which a request is to be blocked because of a fault. In the middle of a prompt
        there is no token to withhold, so the block is owed until there is
    masked_by: the rules whose masks hold a request for now
    """

    def __init__(self) -> None:
        self._outcome: dict[str, str] = {}
        self._unmasked: set[str] = set()  # requests whose mask was not obeyed, until they end
        self.owed: dict[str, RuleFacts] = {}
        self.masked_by: dict[str, frozenset[RuleFacts]] = {}

    def reached(self, req_id: str, outcome: str) -> None:
        if outcome == "masked" and req_id in self._unmasked:
            return
        if _RANK[outcome] > _RANK[self._outcome.get(req_id, "passed")]:
            self._outcome[req_id] = outcome

    def unmasked(self, req_id: str) -> None:
        """A mask was not obeyed: however the request ends, it does not count as masked."""
        self._unmasked.add(req_id)
        if self._outcome.get(req_id) == "masked":
            self._outcome[req_id] = "unjudged"
        self.reached(req_id, "unjudged")

    def owe_block(self, req_id: str, rule: RuleFacts) -> None:
        self.reached(req_id, "blocked")
        self.owed[req_id] = rule

    def end(self, req_id: str) -> str:
        """The outcome of a request that has ended."""
        self.masked_by.pop(req_id, None)
        self._unmasked.discard(req_id)
        self.owed.pop(req_id, None)
        return self._outcome.pop(req_id, "passed")

    def forget_all(self) -> int:
        """How many requests were known."""
        parts = (self._outcome, self._unmasked, self.owed, self.masked_by)
        known = set().union(*parts)
        for part in parts:
            part.clear()
        return len(known)

    def masked_requests(self, policies: Iterable[str]) -> dict[str, int]:
        """How many requests masks of each policy hold; of these policies even if none."""
        count = dict.fromkeys(policies, 0)
        for rules in self.masked_by.values():
            for policy in {rule.policy for rule in rules}:
                count[policy] = count.get(policy, 0) + 1
        return count
