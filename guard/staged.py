"""The guard of one rank of a pipeline, which routes only some of the model's layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from guard.device.layout import LOAD_EVERY_STEPS, NULL_SLOT, Capacity
from guard.device.pipeline import PendingStep, PipelineStage, StageEvidence
from guard.device.readback import Readback, StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import host_to_device
from guard.errors import ReloadRefusedError
from guard.failures import Stage
from guard.prepared import PreparedProgram
from guard.program.program import TOKEN_SIGNAL, Program
from guard.program.step_report import Judged, PackedReport, RequestColumn, StepReport
from guard.runtime import Guard


class StagedGuard(Guard):
    """As `Guard`, with two more calls in a step: `evidence` behind the forward, on every rank, and on
    all but the last `expect_decisions`, in place of `end_step`.

    What a rank cannot speak for is unseen on all of them: a fault anywhere leaves the requests of
    its step unjudged, and one that leaves a rank's slots behind leaves them so until they end.
    """

    _has_all_layers = False

    def __init__(
        self,
        program: Program,
        capacity: Capacity,
        device: torch.device,
        *,
        stage: PipelineStage,
        masking: bool = True,
        load_every: int = LOAD_EVERY_STEPS,
    ) -> None:
        super().__init__(program, capacity, device, masking=masking, load_every=load_every)
        self.stage = stage
        self._check.watch(stage.layers)
        self._num_signals = program.signals.num_evidence
        self._behind: set[str] = set()  # requests whose slots here are not what they are elsewhere
        self._evidence = StageEvidence(torch.empty(0, 0))
        self._num_step_requests = 0

    @property
    def layers(self) -> Sequence[int]:
        return self.stage.layers

    def prepare(self, program: Program) -> PreparedProgram:
        raise ReloadRefusedError(
            "policies are not reloaded under pipeline parallelism yet: a rank decides about steps that "
            "are over elsewhere; restart the server"
        )

    def finish_requests(self, req_ids: Iterable[str]) -> None:
        ended = tuple(req_ids)
        super().finish_requests(ended)
        self._behind.difference_update(ended)

    @torch.inference_mode()
    def evidence(
        self, num_rows: int, num_requests: int, earlier: StageEvidence | None
    ) -> StageEvidence | None:
        """What this rank and those before saw in a step, to be sent on with the hidden states.

        num_rows, num_requests: T and B of the step, known even where `begin_step` failed
        earlier: what came with the hidden states; None on the first rank
        Returns rows of zeros after a fault. None where no step has evidence.
        """
        if self._evaluator is None:
            return None
        width = self._num_signals + self.capacity.mask_words
        zeros_TY = torch.zeros((num_rows, width), dtype=torch.int64, device=self.device)
        self._evidence = StageEvidence(zeros_TY)
        self._num_step_requests = num_requests
        batch, spoke = self._batch, False
        if batch is not None and not self.blind and (earlier is None) == self.stage.is_first:
            with self.failures.caught(Stage.EVALUATE):
                rows_TY = self._own_rows(batch, None if earlier is None else earlier.rows_TY)
                if self.agreement is not None and not self.stage.is_last:
                    spoke = True  # the last rank compares what it decides
                    rows_TY, self._findings = self.agreement.agree_on_rows(
                        rows_TY, batch.request_T, num_requests, self._findings
                    )
                    if self._findings is not None:
                        self._check.hear(self._findings)
                self._add_findings(rows_TY, earlier, num_requests)
        if not spoke and not self.stage.is_last:
            self._report_fault()
        return self._evidence

    def _own_rows(self, batch: StepBatch, earlier_TY: torch.Tensor | None) -> torch.Tensor:
        speaks_np = np.array([r not in self._behind for r in self._req_ids], dtype=np.int64)
        speaks_T = host_to_device(speaks_np, self.device)[batch.request_T]
        own_TX = self._own_signals(batch) * speaks_T[:, None]
        row_bits_TW = own_TX.new_zeros((len(own_TX), self.capacity.mask_words))
        if self.mask is not None:
            row_bits_TW = self.mask.row_bits_TW[: len(own_TX)]
        return self.stage.forward(own_TX, row_bits_TW, earlier_TY)

    def _add_findings(
        self, rows_TY: torch.Tensor, earlier: StageEvidence | None, num_requests: int
    ) -> None:
        """Ranks that do not check the same steps could not speak for one another: then none does."""
        own = self._findings
        if earlier is not None and (earlier.findings_N is None) != (own is None):
            return
        if own is None:
            self._evidence = StageEvidence(rows_TY)
            return
        findings_N = self._check.form.pack(own)
        if earlier is not None and earlier.findings_N is not None:
            findings_N = findings_N + earlier.findings_N
            self._findings = self._check.form.unpack(findings_N, num_requests)
        self._evidence = StageEvidence(rows_TY, findings_N)

    @torch.inference_mode()
    def end_step(
        self, rejected_B: torch.Tensor | None = None
    ) -> Readback | PackedReport | StepReport | None:
        """On the last rank: tell the others what was seen, and decide."""
        if self._evaluator is None:
            return None
        assert self.stage.is_last, "only the last rank samples"
        with self.failures.caught(Stage.RANKS):
            signal_TX = self.stage.complete(self._evidence.rows_TY, self._num_signals)
            if rejected_B is None:
                rejected_B = signal_TX.new_zeros(self._num_step_requests)
            self.stage.send_back(signal_TX, rejected_B)
        return super().end_step(rejected_B)

    @torch.inference_mode()
    def expect_decisions(
        self,
        req_ids: Sequence[str],
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        sampled: Collection[str],
    ) -> None:
        """On the other ranks: a step was computed, whose signals will come from the last rank.

        The arguments are those of `begin_step`, and the requests for which the step samples a token.
        """
        if self._evaluator is None:
            return
        batch, self._batch, self._req_ids = self._batch, None, ()
        if batch is None:  # a fault; what will come must be received all the same
            self._behind.update(req_ids)
            nobody_B = torch.full((len(req_ids),), NULL_SLOT, device=self.device)
            batch = StepBatch.of(nobody_B, query_start_B1, position_T)
        # The engine writes the next step's positions over these.
        batch = batch._replace(position_T=batch.position_T.clone())
        self.stage.expect(tuple(req_ids), batch, sampled, self._num_signals)

    def _catch_up(self, req_ids: Collection[str]) -> None:
        for step in self.stage.due(req_ids):
            with self.failures.caught(Stage.EVALUATE) as attempt:
                num_rows = len(step.batch.position_T)
                signals, rejected_B = step.payload.tensor_split([num_rows * self._num_signals])
                batch = step.batch._replace(slots_B=self._slots_still_of(step))
                self._judge(step.req_ids, batch, signals.view(num_rows, -1), rejected_B)
            if attempt.failed:
                self._behind.update(step.req_ids)

    def _slots_still_of(self, step: PendingStep) -> torch.Tensor:
        """int64 [B]: the null slot for requests that have ended since; theirs are others' now."""
        is_here_np = np.array([req_id in self._slot_of for req_id in step.req_ids], dtype=np.bool_)
        return step.batch.slots_B.where(host_to_device(is_here_np, self.device), NULL_SLOT)

    def _signals(self, batch: StepBatch, rejected_B: torch.Tensor | None) -> torch.Tensor:
        return self.stage.complete(self._evidence.rows_TY, self._num_signals)

    def _judge(
        self,
        req_ids: Sequence[str],
        batch: StepBatch,
        signal_TX: torch.Tensor,
        rejected_B: torch.Tensor | None,
    ) -> StepDecisions:
        decisions = super()._judge(req_ids, batch, signal_TX, rejected_B)
        is_unseen_T = (signal_TX[:, TOKEN_SIGNAL] == 0).to(torch.int64)
        is_unseen_B = torch.zeros_like(batch.slots_B).index_add_(0, batch.request_T, is_unseen_T) > 0
        # Rules that still hold fire again, as on a rank whose own evaluation broke off.
        self._state.active_SR[batch.slots_B] &= ~is_unseen_B[:, None]
        requests_B = decisions.requests_B.clone()
        requests_B[:, RequestColumn.JUDGED].masked_fill_(is_unseen_B, Judged.RANKS_DIFFER)
        return decisions._replace(requests_B=requests_B)

    def _failed_step(self, req_ids: Sequence[str]) -> StepReport:
        slots = [self._slot_of[req_id] for req_id in req_ids if req_id in self._slot_of]
        with self.failures.caught(Stage.EVALUATE):
            self._state.distrust(host_to_device(np.array(slots, dtype=np.int64), self.device))
        return super()._failed_step(req_ids)
