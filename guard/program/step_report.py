"""What a step reports to the host: arrays and names, no tensors, so that it crosses process borders.

Letters: B requests of the step, N named sets, C conditions, V events, W mask words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEVER = 2**62
"""A position that no request reaches."""


class RequestColumn:
    """Columns of `StepReport.requests_B`; the named sets' selections follow the last one.

    Token and selection counts are of this step alone.
    """

    BLOCK_KEY = 0  # position·R + rule of the first block, or NEVER
    MASK_FROM = 1  # first position under a mask that is not static, or NEVER
    PROMPT_TOKENS = 2
    OUTPUT_TOKENS = 3
    UNSEEN = 4  # of the request so far
    JUDGED = 5  # one of `Judged`
    LATE = 6  # of the request so far, what some rule did not see: `UNSEEN`, or from before it came
    NUM = 7


class Judged:
    """Whether a request was judged in a step."""

    NO = 0  # it has no slot
    YES = 1
    RANKS_DIFFER = -1  # not all ranks saw its rows, or they did not decide alike


class EventColumn:
    """Columns of `StepReport.events_V`."""

    REQUEST = 0  # row of `requests_B`
    RULE = 1
    POSITION = 2
    IN_PROMPT = 3
    ENFORCED = 4
    UNSEEN = 5  # of the request up to this position, what the rule did not see
    EXEMPT = 6  # an exception withheld the action
    NUM = 7


class Finding:
    """Columns of what the running check finds in a row of a layer."""

    MISSING = 0  # no expert where one must be; a layer that does not report has it in every row
    OUT_OF_RANGE = 1  # an id that is no logical expert
    NOT_FINITE = 2  # a gate weight that is NaN or infinite
    DUPLICATE = 3  # an expert that has weight twice
    NUM = 4


@dataclass(frozen=True, slots=True)
class RoutingCheck:
    """What the running check found in one step. Letters: L MoE layers, A mask actions.

    layers: the model's own numbers of the L layers
    findings_LF: int64 [L, Finding.NUM], rows that have the finding in a layer
    silent_L: bool [L], layers that wrote nothing at all
    findings_BF: int64 [B, Finding.NUM], rows and layers of a request that have it
    violations_L: int64 [L], masked experts at work in a layer
    violations_BA: int64 [B, A], how often a request's mask action was not obeyed
    """

    layers: tuple[int, ...]
    findings_LF: NDArray[np.int64]
    silent_L: NDArray[np.bool_]
    findings_BF: NDArray[np.int64]
    violations_L: NDArray[np.int64]
    violations_BA: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What accepted draft tokens added, where a step verified some: the engine may end a request at
    one of them, by a stop or a block, and then those behind it do not count.

    next_B: the position after the last one that was evaluated
    num_rows_B: rows, the request's last ones, to which a draft token was fed
    sets_BKN: int64; selections of each named set in the last 1, 2, … K of them
    extremes_BKC: as `StepReport.extremes_BC`, without the last 1, 2, … K of them
    """

    next_B: NDArray[np.int64]
    num_rows_B: NDArray[np.int64]
    sets_BKN: NDArray[np.int64]
    extremes_BKC: NDArray[np.float32]


class StepSummary(NamedTuple):
    """What a step's report can hold at all, so that a quiet step is not searched row by row.

    blocks: some request has a block
    begins_masks: some request has a mask that came on on the way
    masks: some request is under a mask at its next position
    is_all_seen: every request was judged, and nothing of any was unseen
    sums_F: int64 [columns of `requests_B`], each added up over all requests
    """

    blocks: bool
    begins_masks: bool
    masks: bool
    is_all_seen: bool
    sums_F: NDArray[np.int64]

    @staticmethod
    def of(report: StepReport) -> StepSummary:
        if report.summary is not None:
            return report.summary
        if not len(report.requests_B):
            sums_F = np.zeros(report.requests_B.shape[1], dtype=np.int64)
            return StepSummary(False, False, False, False, sums_F)
        fixed_BF = report.requests_B[:, : RequestColumn.NUM]
        least_F, most_F = fixed_BF.min(axis=0).tolist(), fixed_BF.max(axis=0).tolist()
        return StepSummary(
            least_F[RequestColumn.BLOCK_KEY] < NEVER,
            least_F[RequestColumn.MASK_FROM] < NEVER,
            bool(report.masked_BW.any()),
            least_F[RequestColumn.JUDGED] == most_F[RequestColumn.JUDGED] == Judged.YES
            and most_F[RequestColumn.UNSEEN] <= 0
            and most_F[RequestColumn.LATE] <= 0,
            report.requests_B.sum(axis=0),
        )


class HostSeconds(NamedTuple):
    """Host time that the guard took of a step in the worker. report: to read what was decided, without
    the wait for the device"""

    begin: float
    end: float
    report: float = 0.0


def _no_events() -> NDArray[np.int64]:
    return np.zeros((0, EventColumn.NUM), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepReport:
    """The decisions of one step.

    revision: of the program that decided
    req_ids: of the rows of `requests_B`, the engine's own ids
    requests_B: int64 [B, RequestColumn.NUM + N]
    masked_BW: int64 [B, W]; bits of the mask actions in force at each request's next position
    extremes_BC: float32 [B, C]; each condition's value nearest to or furthest beyond its threshold
        in the request so far, NaN where it was never known
    events_V: int64 [V, EventColumn.NUM], by request, position, then deciding order
    values_V: float64 [V, most conditions of a rule]; NaN where unknown
    num_events: firings in this step; more than V where some did not fit
    more_events_V: int64 [num_events - V, EventColumn.NUM], those that did not, in no order
    failures: faults since the last report, by stage
    failed: this step was not judged at all; every array is empty
    drafts: where the server decodes speculatively
    check: what the running check found; None in the steps that it leaves out
    summary: where the judge made one
    host: what the step took of the host, where it was measured
    """

    revision: str
    req_ids: tuple[str, ...]
    requests_B: NDArray[np.int64]
    masked_BW: NDArray[np.int64]
    extremes_BC: NDArray[np.float32]
    events_V: NDArray[np.int64]
    values_V: NDArray[np.float64]
    num_events: int
    failures: Mapping[str, int] = field(default_factory=dict)
    failed: bool = False
    more_events_V: NDArray[np.int64] = field(default_factory=_no_events)
    drafts: DraftReport | None = None
    check: RoutingCheck | None = None
    summary: StepSummary | None = None
    host: HostSeconds | None = None

    def unjudged(self) -> set[str]:
        """Requests that the step computed without judging, or surely masking, them."""
        if self.failed:
            return set(self.req_ids)
        judged_B = self.requests_B[:, RequestColumn.JUDGED]
        return {self.req_ids[row] for row in np.flatnonzero(judged_B != Judged.YES).tolist()}

    @staticmethod
    def of_failed_step(
        revision: str, req_ids: Sequence[str], failures: Mapping[str, int]
    ) -> StepReport:
        return StepReport(
            revision,
            tuple(req_ids),
            np.zeros((0, RequestColumn.NUM), dtype=np.int64),
            np.zeros((0, 0), dtype=np.int64),
            np.zeros((0, 0), dtype=np.float32),
            _no_events(),
            np.zeros((0, 0), dtype=np.float64),
            0,
            failures,
            failed=True,
        )


class ReportForm(NamedTuple):
    """Widths of a program's reports: of `requests_B`, of `masked_BW` and of `extremes_BC`."""

    num_columns: int
    num_words: int
    num_conditions: int

    def num_bytes(self, num_requests: int) -> int:
        """Of a packed report's data: sums, `requests_B`, `masked_BW`, `extremes_BC`, in whole words."""
        columns, words, conditions = self
        extremes = -(-num_requests * conditions // 2)
        return 8 * (columns + num_requests * (columns + words) + extremes)


class PackedFlag:
    """What a packed report holds, as in `StepSummary`."""

    BLOCKS = 1
    BEGINS_MASKS = 2
    MASKS = 4
    ALL_SEEN = 8
    CHECKED = 16
    """By the running check, which found nothing; then the report's `check` is not made."""


class MasksInForce(NamedTuple):
    """The masks of a step's requests, to be compared with another step's.

    words: `StepReport.masked_BW`
    begin: where masks that came on on the way begin; empty where none did
    """

    req_ids: tuple[str, ...]
    words: bytes
    begin: bytes

    @classmethod
    def of(cls, report: StepReport, summary: StepSummary) -> MasksInForce:
        begin_B = report.requests_B[:, RequestColumn.MASK_FROM]
        begin = begin_B.tobytes() if summary.begins_masks else b""
        return cls(report.req_ids, report.masked_BW.tobytes(), begin)


class PackedReport:
    """`StepReport` of a step in which nothing fired, not taken apart: of most of them nobody asks for
    more than the sums.

    data: int64 [columns], the sums; behind them `requests_B`, `masked_BW` and `extremes_BC`
    begin_s, end_s: what the step took of the host; 0 where nobody measured it
    """

    __slots__ = ("begin_s", "data", "end_s", "flags", "form", "req_ids", "revision")

    failed = False
    failures: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self, revision: str, req_ids: tuple[str, ...], form: ReportForm, data: bytes, flags: int
    ) -> None:
        self.revision = revision
        self.req_ids = req_ids
        self.form = form
        self.data = data
        self.flags = flags
        self.begin_s = self.end_s = 0.0

    @property
    def host(self) -> HostSeconds | None:
        return HostSeconds(self.begin_s, self.end_s) if self.end_s else None

    @property
    def sums(self) -> bytes:
        """int64 [columns]: `StepSummary.sums_F`."""
        return self.data[: 8 * self.form.num_columns]

    @property
    def masks(self) -> MasksInForce:
        columns, words, _ = self.form
        num_requests = len(self.req_ids)
        first = 8 * columns * (1 + num_requests)
        begin = b""
        if self.flags & PackedFlag.BEGINS_MASKS:
            facts_F = np.frombuffer(self.data, dtype=np.int64, count=first // 8)[columns:]
            begin = facts_F[RequestColumn.MASK_FROM :: columns].tobytes()
        return MasksInForce(self.req_ids, self.data[first : first + 8 * words * num_requests], begin)

    def unpacked(self) -> StepReport:
        columns, words, conditions = self.form
        num_requests = len(self.req_ids)
        # A copy, since who reads a report may write in it.
        numbers = np.frombuffer(bytearray(self.data), dtype=np.int64)
        sums_F, rest = np.split(numbers, [columns])
        requests, masked, extremes = np.split(
            rest, np.cumsum([num_requests * columns, num_requests * words])
        )
        return StepReport(
            self.revision,
            self.req_ids,
            requests.reshape(num_requests, columns),
            masked.reshape(num_requests, words),
            extremes.view(np.float32)[: num_requests * conditions].reshape(num_requests, conditions),
            _no_events(),
            np.zeros((0, 0), dtype=np.float64),
            0,
            summary=StepSummary(
                bool(self.flags & PackedFlag.BLOCKS),
                bool(self.flags & PackedFlag.BEGINS_MASKS),
                bool(self.flags & PackedFlag.MASKS),
                bool(self.flags & PackedFlag.ALL_SEEN),
                sums_F,
            ),
            host=self.host,
        )
