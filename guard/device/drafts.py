"""What each accepted draft token of a step added, so that the engine can still take some back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from guard.device.rows import FreshRows, StepBatch


class DraftDecisions(NamedTuple):
    """`DraftReport`'s arrays while they are on the device. K: the most draft tokens of a request."""

    next_B: torch.Tensor
    num_rows_B: torch.Tensor
    sets_BKN: torch.Tensor
    extremes_BKC: torch.Tensor


def split_drafts(
    max_draft_tokens: int,
    sets_TN: torch.Tensor,
    signed_TC: torch.Tensor,
    signed_before_BC: torch.Tensor,
    batch: StepBatch,
    fresh: FreshRows,
) -> DraftDecisions:
    """Sums and extremes without each request's last 1, 2, … rows that a draft token was fed to.

    sets_TN: selections of each named set at each row
    signed_TC: values turned so that the extreme is the largest; -inf where not known
    signed_before_BC: the request's extremes before this step
    """
    back_K = torch.arange(max_draft_tokens, device=sets_TN.device)
    row_BK = fresh.last_row_B[:, None] - back_K
    # The row before it is of the same request and step: the last token that was there already.
    is_draft_BK = row_BK > batch.query_start_B1[:-1, None]
    row_BK = row_BK.clamp(min=0)
    is_draft_BK &= fresh.fresh_T[row_BK] & (batch.position_T[row_BK] >= fresh.prompt_B[:, None])
    sets_BKN = (sets_TN[row_BK] * is_draft_BK[:, :, None]).cumsum(1)

    is_draft_T = torch.zeros_like(fresh.fresh_T, dtype=torch.int8)
    is_draft_T.scatter_reduce_(0, row_BK.flatten(), is_draft_BK.flatten().to(torch.int8), "amax")
    other_TC = signed_TC.where((is_draft_T == 0)[:, None], float("-inf"))
    least_BC = signed_before_BC.scatter_reduce(
        0, batch.request_T[:, None].expand_as(other_TC), other_TC, "amax"
    )
    kept_BKC = signed_TC[row_BK].where(is_draft_BK[:, :, None], float("-inf"))
    # Without the last k rows: what was there, and the draft rows from the (k+1)th last on.
    before_BKC = torch.cat([kept_BKC[:, 1:], least_BC[:, None]], dim=1)
    extremes_BKC = before_BKC.flip(1).cummax(1).values.flip(1)
    return DraftDecisions(fresh.after_B, is_draft_BK.sum(1), sets_BKN, extremes_BKC)
