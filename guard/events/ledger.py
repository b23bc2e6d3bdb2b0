"""The engine's book of decisions: what the workers reported becomes real here, once.

Under async scheduling a worker computes a step more for a request that has just ended. Only the
engine core knows which steps count, so events, counters and outcomes are made here and not there.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.events.liveness import Liveness
from guard.events.message import Decision, Delta, EvidenceFacts, RuleFacts
from guard.events.outcomes import Outcomes
from guard.events.rulebook import RuleBook, RuleBooks
from guard.events.tally import Tally
from guard.failures import Stage
from guard.program.applicability import RulesFor
from guard.program.step_report import (
    NEVER,
    EventColumn,
    Judged,
    MasksInForce,
    PackedFlag,
    PackedReport,
    RequestColumn,
    StepReport,
    StepSummary,
)

_QUIET = StepSummary(
    blocks=False, begins_masks=False, masks=False, is_all_seen=True, sums_F=np.zeros(0, dtype=np.int64)
)
"""Of a step whose sums are added up later."""


_OF_MASKS = PackedFlag.BEGINS_MASKS | PackedFlag.MASKS


class Ending(NamedTuple):
    """How the guard ends a request.

    reason: what clients get
    position: of the block; the token sampled at it is withheld, and all after it. None where all
        of the step's tokens are, because the step was not judged
    """

    reason: str
    position: int | None = None


class Ledger:
    """One engine's. `take_quiet_step`, or else `note_step` and `begin_step`, then `accept` for each
    request that got tokens; `finish` for each that ends, then `end_step`.

    book: of the revision in force; `follow` brings the next one
    redacted: give clients no policy or rule names
    rules_of: which rules of the revision in force apply to a request and act on it, by its id; by
        default as for one of which nothing is known but that
    clock: gives decisions their time; timer: says how long counters have waited, and never jumps
    liveness: kept up to date with each report
    num_forgotten: requests whose end was missed, because of a fault
    """

    def __init__(
        self,
        engine: int,
        book: RuleBook,
        *,
        redacted: bool = False,
        external_id: Callable[[str], str] = str,
        rules_of: Callable[[str], RulesFor] | None = None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
        liveness: Liveness | None = None,
    ) -> None:
        self._books = RuleBooks(book)
        self._book = book  # of the step's report
        self._redacted = redacted
        self._external_id = external_id
        self._clock = clock
        self._rules_of = rules_of
        self.liveness = liveness or Liveness(engine)
        self._report: StepReport | None = None
        self._quiet: PackedReport | None = None  # in place of `_report` and `_row_of`
        self._row_of: dict[str, int] = {}
        self._summary: StepSummary | None = None
        self._noted: MasksInForce | None = None  # of the last step that was none of the quiet ones
        self._open: dict[str, int] = {}  # requests of this step whose accepted drafts may be cut
        self._num_cut: dict[str, int] = {}
        self._outcomes = Outcomes()
        self.num_forgotten = 0
        self._tally = Tally(engine, book, timer)

    def follow(self, book: RuleBook) -> None:
        """A new revision is in force. Steps that the one before decided may still come."""
        self._books.add(book)
        self._noted = None
        if not book.rules:
            self._outcomes.masked_by.clear()  # no report will say so

    def take_quiet_step(self, report: PackedReport) -> bool:
        """Take a step in which nothing happened: it changes sums, which are added up later, and ends
        nobody; its requests are under the masks of the step before. False: this is no such step, and
        nothing is taken.

        The engine must accept this step's result for each of its requests.
        """
        outcomes, liveness, tally, flags = self._outcomes, self.liveness, self._tally, report.flags
        if flags & PackedFlag.BLOCKS or not flags & PackedFlag.ALL_SEEN or outcomes.owed:
            return False
        if (flags & _OF_MASKS or outcomes.masked_by) and report.masks != self._noted:
            return False
        if liveness.blind or liveness.silent or not liveness.judges:
            return False
        if not report.revision == self._book.revision == tally.revision:
            return False
        self._quiet, self._report, self._summary = report, None, _QUIET
        self._row_of, self._open, self._num_cut = {}, {}, {}
        tally.quiet_steps.append(report)
        return True

    def begin_step(
        self,
        report: StepReport | PackedReport,
        rows_of: Callable[[Sequence[str]], dict[str, int]],
    ) -> dict[str, Ending]:
        """Take a step's report. Returns the requests to end.

        rows_of: of these requests, the place of each for which the engine accepts this step's result
        """
        if isinstance(report, PackedReport):
            if report.flags & PackedFlag.CHECKED:
                self.liveness.note_sound()
            report = report.unpacked()
        self._quiet, self._report, self._summary, self._noted = None, report, None, None
        self.note_failures(report.failures)
        self._open, self._num_cut = {}, {}
        self._row_of = rows_of(report.req_ids)
        self._summary = summary = StepSummary.of(report)
        if report.failed:
            self.liveness.note(report)
            for req_id in self._row_of:
                self._note_unjudged(req_id)
            return self._owed_blocks()
        self._turn_to(report.revision)
        self.note_failures(self.liveness.note(report, self._book.masks))
        if report.drafts is not None:
            self._open = {
                req_id: row for req_id, row in self._row_of.items() if report.drafts.num_rows_B[row]
            }
        if not self._open and len(self._row_of) == len(report.req_ids):
            self._count_sums(summary.sums_F)
        else:
            rows = [row for req_id, row in self._row_of.items() if req_id not in self._open]
            if rows:
                self._count_sums(report.requests_B[rows].sum(axis=0))
        self._note_violations(report)
        self._note_masks(report, summary)
        if not summary.is_all_seen:
            self._note_unseen(report)
        self._note_untrusted(report)
        blocked = self._blocks(report) if summary.blocks else {}
        for req_id, owed in self._owed_blocks().items() if self._outcomes.owed else ():
            reason = blocked.get(req_id, owed).reason
            blocked[req_id] = Ending(reason)  # none of this step's tokens was to come out
        self._note_events(report)
        self._note_more_events(report)
        if not self._open and not self.liveness.violated and len(self._row_of) == len(report.req_ids):
            self._noted = MasksInForce.of(report, summary)
        return blocked

    def _turn_to(self, revision: str) -> None:
        """The numbers of the report are those of its own revision."""
        self._book = self._books.of(revision)
        if revision != self._tally.revision:
            self._tally.turn_to(self._book, self._masked_requests())

    def give_up(self, req_ids: Iterable[str]) -> dict[str, Ending]:
        """As `begin_step`, where not even a failed step can be entered."""
        self._report, self._row_of = None, {req_id: row for row, req_id in enumerate(req_ids)}
        self._quiet = self._noted = None
        self._summary = None
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
            counted[RequestColumn.NUM : RequestColumn.NUM + self._book.num_sets] -= (
                report.drafts.sets_BKN[row, num_cut - 1]
            )
        elif req_id in self._outcomes.masked_by:
            self._outcomes.reached(req_id, "masked")
        self._count_sums(counted)
        block_key = int(report.requests_B[row, RequestColumn.BLOCK_KEY])
        if block_key < NEVER and block_key // len(self._book.rules) <= last_position:
            self._outcomes.reached(req_id, "blocked")
        for event, values in zip(report.events_V, report.values_V, strict=True):
            if event[EventColumn.REQUEST] == row and event[EventColumn.POSITION] <= last_position:
                self._note_decision(report, req_id, row, event, values)
        more_V = report.more_events_V
        is_own_V = more_V[:, EventColumn.REQUEST] == row
        self._count_events(
            report, more_V[is_own_V & (more_V[:, EventColumn.POSITION] <= last_position)]
        )

    def note_step(self, report: StepReport | PackedReport) -> None:
        """A step was taken, once, however it went."""
        self._tally.count_step(report.host)

    def note_failures(self, failures: Mapping[str, int]) -> None:
        """Faults in the engine core itself, by stage."""
        self._tally.count("failures", failures)

    @property
    def awaits_tokens(self) -> bool:
        """How many of a request's tokens count is still to be said: some may be drafts."""
        return bool(self._open)

    @property
    def has_seen_all(self) -> bool:
        """The step's requests were all judged, and nothing of any was unseen."""
        return self._summary is not None and self._summary.is_all_seen

    def mask_starts(self) -> dict[str, int]:
        """First positions under a mask that came on on the way, as of this step, by request."""
        report = self._report
        if report is None or self._summary is None or not self._summary.begins_masks:
            return {}
        starts_B = report.requests_B[:, RequestColumn.MASK_FROM]
        rows = np.flatnonzero(starts_B < NEVER).tolist()
        starts = {report.req_ids[row]: int(starts_B[row]) for row in rows}
        return {req_id: start for req_id, start in starts.items() if req_id in self._row_of}

    def finish(self, req_id: str) -> None:
        """A request ended, whether by itself or by a client that went away."""
        self._noted = None
        if self._quiet is not None and req_id in self._quiet.req_ids:
            self._report, self._quiet = self._quiet.unpacked(), None
            self._row_of = {each: row for row, each in enumerate(self._report.req_ids)}
        row = self._row_of.get(req_id)
        if row is not None and self._report is not None and not self._report.failed:
            self.accept(req_id, NEVER)
            num_cut = self._num_cut.get(req_id)
            if num_cut is None or self._report.drafts is None:
                self._observe_values(self._report.extremes_BC[row])
            else:
                self._observe_values(self._report.drafts.extremes_BKC[row, num_cut - 1])
        self._tally.count("outcomes", {self._outcomes.end(req_id): 1})

    def has_begun(self, report: StepReport | PackedReport) -> bool:
        """Its faults are counted, though the step may have broken off behind that."""
        return report is self._report or report is self._quiet

    def forget_requests(self) -> None:
        """The engine has none left. What is still known of some is of those whose end was missed."""
        self._noted = None
        self.num_forgotten += self._outcomes.forget_all()

    def end_step(self, own_s: float = 0.0) -> None:
        """own_s: host time that the engine core's part of the guard took"""
        if self._open:
            for req_id in tuple(self._open):
                self.accept(req_id, NEVER)
        self._report, self._quiet, self._row_of = None, None, {}
        self._tally.ledger_s += own_s

    def note_own_time(self, seconds: float) -> None:
        """Further host time, between two steps."""
        self._tally.ledger_s += seconds

    @property
    def due_at(self) -> float:
        """When counters of quiet steps are to be taken, by the timer."""
        return self._tally.due_at

    def take(self, *, idle: bool) -> Delta | None:
        """What is due for delivery, if anything; where revisions changed there may be more behind it.
        idle: no request is left, so nothing may wait."""
        current = self._books.current
        if not current.rules and self._tally.revision != current.revision:
            self._tally.turn_to(current, self._masked_requests())  # no report will say so
        return self._tally.take(self._masked_requests, idle=idle)

    def put_back(self, delta: Delta) -> None:
        """What `take` gave did not get out: counters go with the next one, decisions are lost."""
        self._tally.put_back(delta)

    def _count_sums(self, sums_F: NDArray[np.int64]) -> None:
        """sums_F: columns of `requests_B`, added up over the requests that count"""
        self._tally.add(sums_F)

    def _note_masks(self, report: StepReport, summary: StepSummary) -> None:
        masked_by, violated = self._outcomes.masked_by, self.liveness.violated
        if not masked_by and not summary.masks:
            return
        for req_id in self._row_of.keys() & masked_by.keys():
            del masked_by[req_id]
        if not self._book.mask_rules:
            return
        for req_id, row in self._counted_rows(report, np.any(report.masked_BW, axis=1)):
            rules = masked_by[req_id] = self._book.masks_in(tuple(report.masked_BW[row].tolist()))
            if violated and (not_obeyed := {rule for rule in rules if rule.reason in violated}):
                self._note_unmasked(req_id, not_obeyed)
            if req_id not in self._open:
                self._outcomes.reached(req_id, "masked")

    def _note_violations(self, report: StepReport) -> None:
        if report.check is None:
            return
        violations_BA = report.check.violations_BA
        for req_id, row in self._counted_rows(report, violations_BA.any(axis=1)):
            rules = set()
            for action in np.flatnonzero(violations_BA[row]).tolist():
                rule = self._book.masks[action]
                self._tally.count("mask_violations", {rule.policy: int(violations_BA[row, action])})
                rules.add(rule)
            self._note_unmasked(req_id, rules)

    def _note_unmasked(self, req_id: str, rules: Collection[RuleFacts]) -> None:
        """The masks of these rules are not obeyed: the request follows their fail mode."""
        self._outcomes.unmasked(req_id)
        for rule in self._book.rules:
            if rule in rules and rule.on_error == "closed":
                self._outcomes.owe_block(req_id, rule)
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
            position, rule = divmod(int(keys_B[row]), len(self._book.rules))
            blocked[req_id] = Ending(self._reason(self._book.rules[rule]), position)
            if req_id not in self._open:
                self._outcomes.reached(req_id, "blocked")
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
        # What was computed before a rule came into force is no fault, for which one would block.
        late_B = report.requests_B[:, RequestColumn.LATE] > 0
        for req_id, _ in self._counted_rows(report, late_B & ~unjudged_B & ~unseen_B):
            self._outcomes.reached(req_id, "unjudged")

    def _note_unjudged(self, req_id: str) -> None:
        """A request that could not be judged in full follows the fail mode of rules that act on it."""
        self._outcomes.reached(req_id, "unjudged")
        book = self._books.current
        if not book.closed_rules:
            return
        enforced_R = book.enforced if self._rules_of is None else self._rules_of(req_id).enforced_R
        for number in book.closed_rules:
            if enforced_R[number]:
                self._outcomes.owe_block(req_id, book.rules[number])
                return

    def _owed_blocks(self) -> dict[str, Ending]:
        owed = self._outcomes.owed
        return {req_id: Ending(self._reason(owed[req_id])) for req_id in self._row_of if req_id in owed}

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
            if block_key < NEVER and position > block_key // len(self._book.rules):
                continue  # computed behind the block, and discarded with its tokens
            self._note_decision(report, req_id, row, event, values)

    def _note_more_events(self, report: StepReport) -> None:
        """Those that the report holds no evidence of: there may be very many."""
        more_V = report.more_events_V
        if not len(more_V):
            return
        last_B = np.full(len(report.req_ids), -1)
        rows = [row for req_id, row in self._row_of.items() if req_id not in self._open]
        last_B[rows] = report.requests_B[rows, RequestColumn.BLOCK_KEY] // len(self._book.rules)
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
            self._tally.decide(key, count)
            self._outcomes.reached(report.req_ids[row], outcome)
        self._tally.drop(Stage.EVALUATE, len(events_V))

    def _kind_of(
        self, number: int, in_prompt: bool, enforced: bool
    ) -> tuple[tuple[int, str, str], str]:
        """What a firing counts as, and the outcome that it gives its request."""
        outcome = {"mask": "masked", "block": "blocked"}.get(
            self._book.rules[number].action, "observed"
        )
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
        rule = self._book.rules[number]
        self._outcomes.reached(req_id, outcome)
        self._tally.decide(key)
        self._tally.keep(
            lambda: Decision(
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
                unseen_tokens=int(event[EventColumn.UNSEEN]),
                exempt=bool(event[EventColumn.EXEMPT]),
                outcome=outcome,
            )
        )

    def _observe_values(self, extremes_C: np.ndarray) -> None:
        first = 0
        for number, rule in enumerate(self._book.rules):
            for condition in rule.measured():
                value = float(extremes_C[first + condition])
                if not math.isnan(value):
                    self._tally.observe(number, condition, value)
            first += len(rule.conditions)

    def _masked_requests(self) -> dict[str, int]:
        return self._outcomes.masked_requests(
            rule.policy for book in self._books for rule in book.masks
        )
