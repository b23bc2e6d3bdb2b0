"""The engine's book of decisions: what the workers reported becomes real here, once.

Under async scheduling a worker computes a step more for a request that has just ended. Only the
engine core knows which steps count, so events, counters and outcomes are made here and not there.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.events.liveness import Liveness
from guard.events.message import Decision, DecisionCount, Delta, EvidenceFacts, RuleFacts
from guard.failures import Stage
from guard.program.applicability import RulesFor
from guard.program.program import WORD_BITS
from guard.program.step_report import NEVER, EventColumn, Judged, RequestColumn, StepReport

MAX_PENDING_DECISIONS = 10_000
"""Decisions that may wait for delivery; more are dropped and counted, their counters are not."""

FLUSH_SECONDS = 0.2
"""Counters wait this long at most; decisions and the end of the last request do not wait."""

OUTCOMES = ("passed", "observed", "unjudged", "masked", "blocked")
_RANK = {outcome: rank for rank, outcome in enumerate(OUTCOMES)}


class Ending(NamedTuple):
    """How the guard ends a request.

    reason: what clients get
    position: of the block; the token sampled at it is withheld, and all after it. None where all
        of the step's tokens are, because the step was not judged
    """

    reason: str
    position: int | None = None


class Ledger:
    """One engine's. `begin_step`, then `accept` for each request that got tokens and `finish` for
    each that ends, then `end_step`.

    rules: in deciding order
    mask_rules: rule of each mask action, in the order of its bits
    num_sets: named sets, whose selections stand behind the fixed columns of a report
    redacted: give clients no policy or rule names
    rules_of: which rules apply to a request and act on it, by its id; by default as for one of which
        nothing is known but that
    liveness: kept up to date with each report
    """

    def __init__(
        self,
        engine: int,
        rules: Sequence[RuleFacts],
        mask_rules: Sequence[int],
        num_sets: int,
        *,
        redacted: bool = False,
        external_id: Callable[[str], str] = str,
        rules_of: Callable[[str], RulesFor] | None = None,
        clock: Callable[[], float] = time.time,
        liveness: Liveness | None = None,
    ) -> None:
        self._engine = engine
        self._rules = tuple(rules)
        self._mask_rules = tuple(mask_rules)
        self._num_sets = num_sets
        self._redacted = redacted
        self._external_id = external_id
        self._clock = clock
        self._enforced = np.array([rule.mode == "enforce" for rule in self._rules], dtype=np.bool_)
        self._rules_of = rules_of
        self.liveness = liveness or Liveness(
            engine, mask_policies=[rules[r].policy for r in mask_rules]
        )
        self._closed_rules = [
            number for number, rule in enumerate(self._rules) if rule.on_error == "closed"
        ]
        self._report: StepReport | None = None
        self._row_of: dict[str, int] = {}
        self._open: dict[str, int] = {}  # requests of this step whose accepted drafts may be cut
        self._num_cut: dict[str, int] = {}
        self._outcome: dict[str, str] = {}
        self._owed: dict[str, str] = {}  # blocks for a fault, until the request ends
        self._masked_by: dict[str, frozenset[int]] = {}
        self._unmasked: set[str] = set()  # requests whose mask was not obeyed, until they end
        self._decision_counts: Counter[tuple[int, str, str]] = Counter()
        self._values: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        self._selections = np.zeros(num_sets, dtype=np.int64)
        self._delta = Delta(engine)
        self._moved = False
        self._flushed_at = 0.0

    def begin_step(self, report: StepReport, is_counted: Callable[[str], bool]) -> dict[str, Ending]:
        """Take a step's report. Returns the requests to end.

        is_counted: whether the engine accepts this step's result for a request
        """
        self._report = report
        self._open, self._num_cut = {}, {}
        self._row_of = {req_id: row for row, req_id in enumerate(report.req_ids) if is_counted(req_id)}
        self.note_failures(report.failures)
        self.note_failures(self.liveness.note(report))
        if report.failed:
            for req_id in self._row_of:
                self._note_unjudged(req_id)
            return self._owed_blocks()
        if report.drafts is not None:
            self._open = {
                req_id: row for req_id, row in self._row_of.items() if report.drafts.num_rows_B[row]
            }
        rows = [row for req_id, row in self._row_of.items() if req_id not in self._open]
        self._count_tokens(report.requests_B[rows])
        self._note_violations(report)
        self._note_masks(report)
        self._note_unseen(report)
        self._note_untrusted(report)
        blocked = self._blocks(report)
        for req_id, owed in self._owed_blocks().items():
            reason = blocked.get(req_id, owed).reason
            blocked[req_id] = Ending(reason)  # none of this step's tokens was to come out
        self._note_events(report)
        self._note_more_events(report)
        return blocked

    def give_up(self, req_ids: Iterable[str]) -> dict[str, Ending]:
        """As `begin_step`, where not even a failed step can be entered."""
        self._report, self._row_of = None, {req_id: row for row, req_id in enumerate(req_ids)}
        for req_id in self._row_of:
            self._note_unjudged(req_id)
        return self._owed_blocks()

    def accept(self, req_id: str, last_position: int) -> None:
        """The engine kept a request's tokens of this step as far as the one fed back at a position:
        what was computed behind it does not count."""
        row, report = self._open.pop(req_id, None), self._report
        if row is None or report is None or report.drafts is None:
            return
        num_rows = int(report.drafts.num_rows_B[row])
        num_cut = min(max(int(report.drafts.next_B[row]) - 1 - last_position, 0), num_rows)
        counted = report.requests_B[row].copy()
        if num_cut:
            self._num_cut[req_id] = num_cut
            counted[RequestColumn.OUTPUT_TOKENS] -= num_cut
            counted[RequestColumn.NUM : RequestColumn.NUM + self._num_sets] -= report.drafts.sets_BKN[
                row, num_cut - 1
            ]
        elif req_id in self._masked_by:
            self._raise_outcome(req_id, "masked")
        self._count_tokens(counted[None])
        block_key = int(report.requests_B[row, RequestColumn.BLOCK_KEY])
        if block_key < NEVER and block_key // len(self._rules) <= last_position:
            self._raise_outcome(req_id, "blocked")
        for event, values in zip(report.events_V, report.values_V, strict=True):
            if event[EventColumn.REQUEST] == row and event[EventColumn.POSITION] <= last_position:
                self._note_decision(report, req_id, row, event, values)
        more_V = report.more_events_V
        is_own_V = more_V[:, EventColumn.REQUEST] == row
        self._count_events(
            report, more_V[is_own_V & (more_V[:, EventColumn.POSITION] <= last_position)]
        )

    def note_failures(self, failures: Mapping[str, int]) -> None:
        """Faults in the engine core itself, by stage."""
        self._count(self._delta.failures, failures)
        self._moved = self._moved or bool(failures)

    def mask_start(self, req_id: str) -> int | None:
        """First position of a request under a mask that came on on the way, as of this step."""
        row = self._row_of.get(req_id)
        if row is None or self._report is None or self._report.failed:
            return None
        start = int(self._report.requests_B[row, RequestColumn.MASK_FROM])
        return None if start >= NEVER else start

    def finish(self, req_id: str) -> None:
        """A request ended, whether by itself or by a client that went away."""
        row = self._row_of.get(req_id)
        if row is not None and self._report is not None and not self._report.failed:
            self.accept(req_id, NEVER)
            num_cut = self._num_cut.get(req_id)
            if num_cut is None or self._report.drafts is None:
                self._observe_values(self._report.extremes_BC[row])
            else:
                self._observe_values(self._report.drafts.extremes_BKC[row, num_cut - 1])
        outcome = self._outcome.pop(req_id, "passed")
        self._masked_by.pop(req_id, None)
        self._unmasked.discard(req_id)
        self._owed.pop(req_id, None)
        self._count(self._delta.outcomes, {outcome: 1})
        self._moved = True

    def end_step(self) -> None:
        for req_id in tuple(self._open):
            self.accept(req_id, NEVER)
        self._report, self._row_of = None, {}

    def take(self, *, idle: bool) -> Delta | None:
        """What is due for delivery, if anything. idle: no request is left, so nothing may wait."""
        now = self._clock()
        urgent = idle or self._delta.decisions or now - self._flushed_at >= FLUSH_SECONDS
        if not self._moved or not urgent:
            return None
        delta, self._delta = self._delta, Delta(self._engine)
        delta.decision_counts = [
            DecisionCount(*key, count) for key, count in self._decision_counts.items()
        ]
        delta.selections = self._selections.tolist()
        delta.values = [(*key, values) for key, values in self._values.items()]
        delta.masked_requests = self._masked_requests()
        self._decision_counts.clear()
        self._values.clear()
        self._selections[:] = 0
        self._moved, self._flushed_at = False, now
        return delta

    def put_back(self, delta: Delta) -> None:
        """What `take` gave did not get out: counters go with the next one, decisions are lost."""
        for name in ("tokens", "outcomes", "mask_violations", "failures", "dropped"):
            self._count(getattr(self._delta, name), getattr(delta, name))
        for counted in delta.decision_counts:
            self._decision_counts[counted.rule, counted.mode, counted.phase] += counted.count
        for rule, condition, values in delta.values:
            self._values[rule, condition] += values
        self._selections += np.array(delta.selections, dtype=np.int64)
        self._drop(Stage.DELIVER, len(delta.decisions))

    def _count_tokens(self, counted_B: np.ndarray) -> None:
        if not len(counted_B):
            return
        sums = counted_B.sum(axis=0)
        self._count(
            self._delta.tokens,
            {
                "prompt": int(sums[RequestColumn.PROMPT_TOKENS]),
                "output": int(sums[RequestColumn.OUTPUT_TOKENS]),
            },
        )
        self._selections += sums[RequestColumn.NUM : RequestColumn.NUM + self._num_sets]
        self._moved = True

    def _note_masks(self, report: StepReport) -> None:
        if not self._mask_rules:
            return
        for req_id in self._row_of.keys() & self._masked_by.keys():
            del self._masked_by[req_id]
        violated = {self._mask_rules[action] for action in self.liveness.violated}
        for req_id, row in self._counted_rows(report, np.any(report.masked_BW, axis=1)):
            words = report.masked_BW[row].tolist()
            self._masked_by[req_id] = frozenset(
                rule
                for action, rule in enumerate(self._mask_rules)
                if words[action // WORD_BITS] >> (action % WORD_BITS) & 1
            )
            if not_obeyed := self._masked_by[req_id] & violated:
                self._note_unmasked(req_id, not_obeyed)
            if req_id not in self._open:
                self._raise_outcome(req_id, "masked")

    def _note_violations(self, report: StepReport) -> None:
        if report.check is None:
            return
        violations_BA = report.check.violations_BA
        for req_id, row in self._counted_rows(report, violations_BA.any(axis=1)):
            actions = np.flatnonzero(violations_BA[row]).tolist()
            for action in actions:
                policy = self._rules[self._mask_rules[action]].policy
                self._count(self._delta.mask_violations, {policy: int(violations_BA[row, action])})
            self._moved = True
            self._note_unmasked(req_id, {self._mask_rules[action] for action in actions})

    def _note_unmasked(self, req_id: str, rules: Collection[int]) -> None:
        """The masks of these rules are not obeyed: the request follows their fail mode, and however it
        ends, it does not count as masked."""
        self._unmasked.add(req_id)
        if self._outcome.get(req_id) == "masked":
            self._outcome[req_id] = "unjudged"
        self._raise_outcome(req_id, "unjudged")
        for rule in (self._rules[number] for number in sorted(rules)):
            if rule.on_error == "closed":
                self._owe_block(req_id, rule)
                return

    def _note_untrusted(self, report: StepReport) -> None:
        """Rows whose routing cannot be true were not judged."""
        if self.liveness.silent:
            for req_id in self._row_of:
                self._note_unjudged(req_id)
        elif report.check is not None:
            for req_id, _ in self._counted_rows(report, report.check.findings_BF.any(axis=1)):
                self._note_unjudged(req_id)

    def _blocks(self, report: StepReport) -> dict[str, Ending]:
        blocked = {}
        keys_B = report.requests_B[:, RequestColumn.BLOCK_KEY]
        for req_id, row in self._counted_rows(report, keys_B < NEVER):
            position, rule = divmod(int(keys_B[row]), len(self._rules))
            blocked[req_id] = Ending(self._reason(self._rules[rule]), position)
            if req_id not in self._open:
                self._raise_outcome(req_id, "blocked")
        return blocked

    def _counted_rows(
        self, report: StepReport, flag_B: NDArray[np.bool_] | np.bool_
    ) -> Iterator[tuple[str, int]]:
        """The counted requests for which a flag is set: few, as a rule, out of many."""
        for row in np.flatnonzero(flag_B).tolist():
            req_id = report.req_ids[row]
            if req_id in self._row_of:
                yield req_id, row

    def _note_unseen(self, report: StepReport) -> None:
        judged_B = report.requests_B[:, RequestColumn.JUDGED]
        if np.any(judged_B == Judged.RANKS_DIFFER):
            self.note_failures({Stage.RANKS: 1})
        unjudged_B = judged_B != Judged.YES
        for req_id, _ in self._counted_rows(report, unjudged_B):
            self._note_unjudged(req_id)
        unseen_B = report.requests_B[:, RequestColumn.UNSEEN] > 0
        for req_id, _ in self._counted_rows(report, unseen_B & ~unjudged_B):
            self._note_unjudged(req_id)

    def _note_unjudged(self, req_id: str) -> None:
        """A request that could not be judged in full follows the fail mode of the rules that act on it.

        In the middle of a prompt there is no token to withhold, so the block is owed until there is.
        """
        self._raise_outcome(req_id, "unjudged")
        if not self._closed_rules:
            return
        enforced_R = self._enforced if self._rules_of is None else self._rules_of(req_id).enforced_R
        for number in self._closed_rules:
            if enforced_R[number]:
                self._owe_block(req_id, self._rules[number])
                return

    def _owe_block(self, req_id: str, rule: RuleFacts) -> None:
        self._raise_outcome(req_id, "blocked")
        self._owed[req_id] = self._reason(rule)

    def _owed_blocks(self) -> dict[str, Ending]:
        if not self._owed:
            return {}
        return {req_id: Ending(self._owed[req_id]) for req_id in self._row_of if req_id in self._owed}

    def _reason(self, rule: RuleFacts) -> str:
        return "moe_guard" if self._redacted else rule.reason

    def _note_events(self, report: StepReport) -> None:
        for event, values in zip(report.events_V, report.values_V, strict=True):
            row = int(event[EventColumn.REQUEST])
            req_id = report.req_ids[row]
            if req_id not in self._row_of or req_id in self._open:
                continue
            block_key = int(report.requests_B[row, RequestColumn.BLOCK_KEY])
            position = int(event[EventColumn.POSITION])
            if block_key < NEVER and position > block_key // len(self._rules):
                continue  # computed behind the block, and discarded with its tokens
            self._note_decision(report, req_id, row, event, values)

    def _note_more_events(self, report: StepReport) -> None:
        """Those that the report holds no evidence of: there may be very many."""
        more_V = report.more_events_V
        if not len(more_V):
            return
        last_B = np.full(len(report.req_ids), -1)
        rows = [row for req_id, row in self._row_of.items() if req_id not in self._open]
        last_B[rows] = report.requests_B[rows, RequestColumn.BLOCK_KEY] // len(self._rules)
        is_counted_V = more_V[:, EventColumn.POSITION] <= last_B[more_V[:, EventColumn.REQUEST]]
        self._count_events(report, more_V[is_counted_V])

    def _count_events(self, report: StepReport, events_V: NDArray[np.int64]) -> None:
        """Count decisions that have no line in the log."""
        if not len(events_V):
            return
        columns = [EventColumn.REQUEST, EventColumn.RULE, EventColumn.IN_PROMPT, EventColumn.ENFORCED]
        kinds, counts = np.unique(events_V[:, columns], axis=0, return_counts=True)
        for (row, number, in_prompt, enforced), count in zip(
            kinds.tolist(), counts.tolist(), strict=True
        ):
            key, outcome = self._kind_of(number, bool(in_prompt), bool(enforced))
            self._decision_counts[key] += count
            self._raise_outcome(report.req_ids[row], outcome)
        self._drop(Stage.EVALUATE, len(events_V))

    def _kind_of(
        self, number: int, in_prompt: bool, enforced: bool
    ) -> tuple[tuple[int, str, str], str]:
        """What a firing counts as, and the outcome that it gives its request."""
        outcome = {"mask": "masked", "block": "blocked"}.get(self._rules[number].action, "observed")
        key = (number, "enforce" if enforced else "audit", "prompt" if in_prompt else "output")
        return key, outcome if enforced else "observed"

    def _note_decision(
        self, report: StepReport, req_id: str, row: int, event: np.ndarray, values: np.ndarray
    ) -> None:
        key, outcome = self._kind_of(
            int(event[EventColumn.RULE]),
            bool(event[EventColumn.IN_PROMPT]),
            bool(event[EventColumn.ENFORCED]),
        )
        number, mode, phase = key
        rule = self._rules[number]
        self._raise_outcome(req_id, outcome)
        self._decision_counts[key] += 1
        self._moved = True
        if len(self._delta.decisions) >= MAX_PENDING_DECISIONS:
            self._drop(Stage.EVENT_BUFFER, 1)
            return
        self._delta.decisions.append(
            Decision(
                decision_id=str(uuid.uuid4()),
                time=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
                revision=report.revision,
                policy=rule.policy,
                rule=rule.rule,
                mode=mode,
                action=rule.action,
                severity=rule.severity,
                request_id=self._external_id(req_id),
                phase=phase,
                position=int(event[EventColumn.POSITION]),
                evidence=tuple(
                    EvidenceFacts(label, None if math.isnan(value) else float(value), threshold)
                    for label, value, threshold in zip(
                        rule.conditions, values, rule.thresholds, strict=False
                    )
                ),
                unseen_tokens=int(report.requests_B[row, RequestColumn.UNSEEN]),
                exempt=bool(event[EventColumn.EXEMPT]),
                outcome=outcome,
            )
        )

    def _observe_values(self, extremes_C: np.ndarray) -> None:
        first = 0
        for number, rule in enumerate(self._rules):
            for condition in rule.measured():
                value = float(extremes_C[first + condition])
                if not math.isnan(value):
                    self._values[number, condition].append(value)
            first += len(rule.conditions)

    def _masked_requests(self) -> dict[str, int]:
        masked: Counter[str] = Counter({self._rules[rule].policy: 0 for rule in self._mask_rules})
        for rules in self._masked_by.values():
            masked.update({self._rules[rule].policy for rule in rules})
        return dict(masked)

    def _raise_outcome(self, req_id: str, outcome: str) -> None:
        if outcome == "masked" and req_id in self._unmasked:
            return
        if _RANK[outcome] > _RANK[self._outcome.get(req_id, "passed")]:
            self._outcome[req_id] = outcome

    def _drop(self, stage: Stage, count: int) -> None:
        self._count(self._delta.dropped, {str(stage): count})
        self._moved = True

    @staticmethod
    def _count(into: dict[str, int], counts: dict[str, int] | object) -> None:
        assert isinstance(counts, dict)
        for key, count in counts.items():
            into[key] = into.get(key, 0) + count
