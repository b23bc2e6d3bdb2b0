"""Whether all ranks that compute the same rows decided the same, found out on the device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from guard.device.readback import StepDecisions
from guard.program.step_report import Judged, RequestColumn

_MIX = -7046029254386353131
"""An odd number with bits all over: 2^64 divided by the golden ratio, as a signed one."""

_NO_FAULT, _FAULT = 0, 1


class RankAgreement:
    """One small all-reduce a step over ranks whose rows and decisions must be the same.

    Only one rank's output reaches the engine core, but every rank masks by its own state. So each
    rank gives a digest of every request's decisions and masks, and whether its guard had a fault;
    the greatest and the least digest are equal where all ranks agree. A request on which they do
    not is marked `Judged.RANKS_DIFFER`, on every rank, and follows the fail mode.

    `agree` or `report_fault` must be called once a step on every rank, whatever happened there.
    """

    def __init__(self, group: dist.ProcessGroup, max_requests: int, device: torch.device) -> None:
        self._group = group
        self._max_requests = max_requests
        self._device = device

    def agree(self, decisions: StepDecisions) -> StepDecisions:
        """The same decisions, with the requests marked on which some rank decided otherwise."""
        digest_B = _digests(decisions)
        num_requests = len(digest_B)
        ballot = self._ballot(_NO_FAULT)
        ballot[1 : 1 + num_requests] = digest_B
        ballot[1 + self._max_requests :][:num_requests] = -digest_B
        self._greatest(ballot)
        differs_B = ballot[1 : 1 + num_requests] != -ballot[1 + self._max_requests :][:num_requests]
        differs_B |= ballot[0] != _NO_FAULT
        requests_B = decisions.requests_B.clone()
        judged_B = requests_B[:, RequestColumn.JUDGED]
        requests_B[:, RequestColumn.JUDGED] = judged_B.masked_fill(differs_B, Judged.RANKS_DIFFER)
        return decisions._replace(requests_B=requests_B)

    def report_fault(self) -> None:
        """This rank could not judge its step; the others must know, for they did."""
        self._greatest(self._ballot(_FAULT))

    def _ballot(self, fault: int) -> torch.Tensor:
        """int64 [1 + 2·max_requests]: fault, digests, and the same negated."""
        ballot = torch.zeros(1 + 2 * self._max_requests, dtype=torch.int64, device=self._device)
        ballot[0] = fault
        return ballot

    def _greatest(self, ballot: torch.Tensor) -> None:
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)


def _digests(decisions: StepDecisions) -> torch.Tensor:
    """int64 [B], none of them the least number, whose negation is itself.

    Of a request's report and of its masks at the next position, in arithmetic modulo 2^64.
    """
    facts_BC = torch.cat([decisions.requests_B, decisions.masked_BW], dim=1)
    digest_B = torch.zeros(len(facts_BC), dtype=torch.int64, device=facts_BC.device)
    for fact_B in facts_BC.unbind(dim=1):
        digest_B = (digest_B ^ fact_B) * _MIX
        digest_B = digest_B ^ (digest_B >> 29)
    return digest_B >> 1
