"""What a step's report can hold at all: found once, so that a quiet step is not searched row by row."""

from __future__ import annotations

from typing import NamedTuple

from guard.program.step_report import NEVER, Judged, RequestColumn, StepReport


class StepRange(NamedTuple):
    """
    blocks: some request has a block
    begins_masks: some request has a mask that came on on the way
    masks: some request is under a mask at its next position
    is_all_seen: every request was judged, and nothing of any was unseen
    """

    blocks: bool
    begins_masks: bool
    masks: bool
    is_all_seen: bool

    @staticmethod
    def of(report: StepReport | None) -> StepRange:
        """None: of no step; one that failed has none of these, and was not seen"""
        if report is None or not len(report.requests_B):
            return _NOTHING
        fixed_BF = report.requests_B[:, : RequestColumn.NUM]
        least_F, most_F = fixed_BF.min(axis=0).tolist(), fixed_BF.max(axis=0).tolist()
        return StepRange(
            least_F[RequestColumn.BLOCK_KEY] < NEVER,
            least_F[RequestColumn.MASK_FROM] < NEVER,
            bool(report.masked_BW.any()),
            least_F[RequestColumn.JUDGED] == most_F[RequestColumn.JUDGED] == Judged.YES
            and most_F[RequestColumn.UNSEEN] <= 0
            and most_F[RequestColumn.LATE] <= 0,
        )


_NOTHING = StepRange(blocks=False, begins_masks=False, masks=False, is_all_seen=False)
