"""Evidence of a model whose layers are spread over a pipeline of ranks.

Each rank routes its own layers. A signal is a sum over layers of whole numbers, so a rank's part of it
is exact: the parts go forward with the hidden states and are added up on the way. The last rank knows
a step's signals while it samples, decides, and broadcasts the signals. The others evaluate the same
signals, in the same order, when a request that was sampled then comes back: before its next token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from guard.device.rows import StepBatch
from guard.program.program import TOKEN_SIGNAL


class PendingStep(NamedTuple):
    """A step that a rank has computed, and whose signals are on their way back to it."""

    req_ids: Sequence[str]
    batch: StepBatch
    sampled: frozenset[str]
    payload: torch.Tensor
    work: dist.Work


class StageEvidence(NamedTuple):
    """What a rank sends on with the hidden states: its own word, added to that of the ranks before.

    rows_TY: int64 [T, X + W], see `PipelineStage.forward`
    findings_N: int64, by `FindingsForm`; None in the steps that the running check leaves out
    """

    rows_TY: torch.Tensor
    findings_N: torch.Tensor | None = None


class PipelineStage:
    """One rank's place in the pipeline.

    layers: rows of the topology whose routers are on this rank
    rank, size: of the pipeline
    group: of its ranks, with no other traffic; used once a step by each rank, in step order
    """

    def __init__(self, layers: Collection[int], rank: int, size: int, group: dist.ProcessGroup) -> None:
        self.layers = tuple(layers)
        self.size = size
        self.is_first = rank == 0
        self.is_last = rank == size - 1
        self._group = group
        self._pending: deque[PendingStep] = deque()
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def forward(
        self,
        own_TX: torch.Tensor,
        row_bits_TW: torch.Tensor,
        earlier_TY: torch.Tensor | None,
    ) -> torch.Tensor:
        """int64 [T, X + W], to be sent on: the signals of all layers up to this rank's, and masks.

        own_TX: this rank's part; its `TOKEN_SIGNAL` is 1 for rows of which it can speak
        row_bits_TW: the mask actions that were in force here
        earlier_TY: what the rank before sent; None on the first one

        `TOKEN_SIGNAL` counts the ranks that spoke for a row. A rank does not where its masks are not
        those of the ranks before.
        """
        if earlier_TY is None:
            return torch.cat([own_TX, row_bits_TW], dim=1)
        num_signals = own_TX.shape[1]
        alike_T1 = (earlier_TY[:, num_signals:] == row_bits_TW).all(dim=1, keepdim=True)
        sum_TX = earlier_TY[:, :num_signals] + own_TX * alike_T1
        return torch.cat([sum_TX, earlier_TY[:, num_signals:]], dim=1)

    def complete(self, evidence_TY: torch.Tensor, num_signals: int) -> torch.Tensor:
        """int64 [T, X]: the signals of the rows that every rank spoke for, the others all 0."""
        signal_TX = evidence_TY[:, :num_signals]
        seen_T1 = signal_TX[:, TOKEN_SIGNAL : TOKEN_SIGNAL + 1] == self.size
        signal_TX = signal_TX * seen_T1
        signal_TX[:, TOKEN_SIGNAL : TOKEN_SIGNAL + 1] = seen_T1
        return signal_TX

    def send_back(self, signal_TX: torch.Tensor, rejected_B: torch.Tensor) -> None:
        """On the last rank, once a step, whatever happened: zeros say that nothing was seen."""
        payload = torch.cat([signal_TX.flatten(), rejected_B.to(torch.int64)])
        work = dist.broadcast(payload, group=self._group, group_src=self.size - 1, async_op=True)
        assert work is not None
        self._sent.append((work, payload))
        if len(self._sent) > self.size:
            self._sent.popleft()[0].wait()  # long since done

    def expect(
        self, req_ids: Sequence[str], batch: StepBatch, sampled: Collection[str], num_signals: int
    ) -> None:
        """On the other ranks, once a step: the signals of this step will come. Waits for nothing.

        sampled: the requests for which this step samples a token
        """
        num_rows, num_requests = len(batch.position_T), len(batch.slots_B)
        payload = torch.empty(
            num_rows * num_signals + num_requests,
            dtype=torch.int64,
            device=batch.position_T.device,
        )
        work = dist.broadcast(payload, group=self._group, group_src=self.size - 1, async_op=True)
        assert work is not None
        self._pending.append(PendingStep(req_ids, batch, frozenset(sampled), payload, work))

    def due(self, req_ids: Collection[str]) -> Iterator[PendingStep]:
        """The steps to be evaluated before one with these requests, in order.

        A request's masks depend on nothing behind its last sampled token, so chunks of one prompt
        need not wait for one another. Never more steps are left than the pipeline holds.
        """
        coming = frozenset(req_ids)
        last = max(
            (n for n, step in enumerate(self._pending, 1) if not coming.isdisjoint(step.sampled)),
            default=0,
        )
        for _ in range(max(last, len(self._pending) - self.size)):
            step = self._pending.popleft()
            step.work.wait()
            yield step
