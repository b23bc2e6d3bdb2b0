"""What ranks that compute the same rows tell each other: whether they saw and decided the same."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from guard.device.findings import CheckFindings, FindingsForm
from guard.device.readback import StepDecisions
from guard.program.step_report import Judged, RequestColumn

_MIX = -7046029254386353131
"""An odd number with bits all over: 2^64 divided by the golden ratio, as a signed one."""


class _Head:
    """The first numbers of a ballot, 0 or 1."""

    FAULT = 0
    CHECKED = 1  # the running check looked at this step
    NOT_CHECKED = 2
    NUM = 3


class _Outcome(NamedTuple):
    """differs_B: bool, requests that not all ranks are at one on; findings: of all ranks"""

    differs_B: torch.Tensor
    findings: CheckFindings | None


class RankAgreement:
    """One small all-reduce a step over ranks whose rows and decisions must be the same.

    Only one rank's output reaches the engine core, but every rank masks by its own state and routes by
    itself. So each rank gives a digest of every request's decisions and masks and of the program that
    made them, whether its guard had a fault, and what its running check found. The greatest and the
    least digest are equal where all ranks agree. A request on which they do not is marked
    `Judged.RANKS_DIFFER`, on every rank, and follows the fail mode. Of findings each rank gets the
    greatest numbers: what all see counts once.

    `agree`, `agree_on_rows` or `report_fault` must be called once a step on every rank, whatever
    happened there. The ballot has one size: ranks that do not check the same steps differ, not hang.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_requests: int,
        form: FindingsForm,
        device: torch.device,
    ) -> None:
        self._group = group
        self._max_requests = max_requests
        self._form = form
        self._mark = 0
        self._device = device
        self._findings_start = _Head.NUM + 2 * max_requests

    def follow(self, revision: str, generation: int, form: FindingsForm) -> None:
        """The program that decides from now on. Ranks that have different ones agree on nothing."""
        digest = hashlib.sha256(f"{generation}:{revision}".encode()).digest()
        self._mark = int.from_bytes(digest[:8], "big", signed=True)
        self._form = form

    def agree(
        self, decisions: StepDecisions, findings: CheckFindings | None
    ) -> tuple[StepDecisions, CheckFindings | None]:
        """The same decisions, with the requests marked on which some rank decided otherwise."""
        mark_B1 = torch.full_like(decisions.requests_B[:, :1], self._mark)
        digest_B = _digests(torch.cat([mark_B1, decisions.requests_B, decisions.masked_BW], dim=1))
        outcome = self._vote(digest_B, findings)
        requests_B = decisions.requests_B.clone()
        judged_B = requests_B[:, RequestColumn.JUDGED]
        requests_B[:, RequestColumn.JUDGED] = judged_B.masked_fill(
            outcome.differs_B, Judged.RANKS_DIFFER
        )
        return decisions._replace(requests_B=requests_B), outcome.findings

    def agree_on_rows(
        self,
        rows_TY: torch.Tensor,
        request_T: torch.Tensor,
        num_requests: int,
        findings: CheckFindings | None,
    ) -> tuple[torch.Tensor, CheckFindings | None]:
        """For ranks that see rows and do not decide: the rows of requests of which all ranks saw the
        same, the others all 0."""
        row_B = torch.zeros(num_requests, dtype=torch.int64, device=self._device)
        place_T = torch.arange(len(rows_TY), device=self._device)
        digest_T = _digests(torch.cat([place_T[:, None], rows_TY], dim=1))
        digest_B = _digests(row_B.index_add_(0, request_T, digest_T)[:, None])
        outcome = self._vote(digest_B, findings)
        return rows_TY * ~outcome.differs_B[request_T, None], outcome.findings

    def report_fault(self) -> None:
        """This rank could not judge its step; the others must know, for they did."""
        ballot = self._ballot()
        ballot[_Head.FAULT] = 1
        self._greatest(ballot)

    def _vote(self, digest_B: torch.Tensor, findings: CheckFindings | None) -> _Outcome:
        num_requests = len(digest_B)
        ballot = self._ballot()
        ballot[_Head.NOT_CHECKED if findings is None else _Head.CHECKED] = 1
        _, digests, negated, found = self._parts(ballot, num_requests)
        digests.copy_(digest_B)
        negated.copy_(-digest_B)
        if findings is not None:
            found.copy_(self._form.pack(findings))
        self._greatest(ballot)
        head, digests, negated, found = self._parts(ballot, num_requests)
        differs_B = digests != -negated
        differs_B |= head[_Head.FAULT] != 0
        differs_B |= head[_Head.CHECKED] == head[_Head.NOT_CHECKED]
        if findings is not None:
            findings = self._form.unpack(found, num_requests)
        return _Outcome(differs_B, findings)

    def _ballot(self) -> torch.Tensor:
        """int64: the head, a digest for each request, the same negated, and the findings."""
        size = self._findings_start + self._form.size(self._max_requests)
        return torch.zeros(size, dtype=torch.int64, device=self._device)

    def _parts(
        self, ballot: torch.Tensor, num_requests: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            ballot[: _Head.NUM],
            ballot[_Head.NUM :][:num_requests],
            ballot[_Head.NUM + self._max_requests :][:num_requests],
            ballot[self._findings_start :][: self._form.size(num_requests)],
        )

    def _greatest(self, ballot: torch.Tensor) -> None:
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)


def _digests(facts_BC: torch.Tensor) -> torch.Tensor:
    """int64 [B], none of them the least number, whose negation is itself.

    Of each row, in arithmetic modulo 2^64.
    """
    digest_B = torch.zeros(len(facts_BC), dtype=torch.int64, device=facts_BC.device)
    for fact_B in facts_BC.unbind(dim=1):
        digest_B = (digest_B ^ fact_B) * _MIX
        digest_B = digest_B ^ (digest_B >> 29)
    return digest_B >> 1
