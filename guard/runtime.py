"""The guard of one model replica on one device: the object that an integration holds in each worker."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from guard.device.agreement import RankAgreement
from guard.device.evaluate import StepEvaluator
from guard.device.layout import NULL_SLOT, Capacity
from guard.device.mask import ExpertMask
from guard.device.readback import Readback, StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import Admission, SlotState, host_to_device
from guard.device.tap import RoutingTap
from guard.failures import Failures, Stage
from guard.program.program import Program
from guard.program.step_report import StepReport


class Guard:
    """Watches the routing of each step and decides about each request.

    The integration calls, in this order: `add_request` and `finish_requests` as requests come and
    go, `begin_step` before a forward, the `tap` and the `mask` inside it, `end_step` behind it;
    `idle` before a forward of dummy rows. Nothing here waits for the device.

    blind: set it where not every layer reports: then nothing is judged, and every step says so
    tap: routing of the step, written by the model's routers
    agreement: set it where several ranks compute the same rows; None where one rank does
    mask: what the routers must exclude; None where the server was started to observe only, and then
        the rules that mask are in audit for every request
    """

    def __init__(
        self, program: Program, capacity: Capacity, device: torch.device, *, masking: bool = True
    ) -> None:
        self.program = program
        self.capacity = capacity
        self.device = device
        self.failures = Failures()
        self.blind = False
        self.agreement: RankAgreement | None = None
        self.tap = RoutingTap(program.topology, capacity, device)
        self.mask = ExpertMask(program.topology, capacity, device) if masking else None
        self._state = SlotState(program, capacity, device)
        self._evaluator = (
            StepEvaluator(program, device, capacity.max_draft_tokens) if program.rules else None
        )
        self._slot_of: dict[str, int] = {}
        self._free_slots = list(range(capacity.max_slots, NULL_SLOT, -1))
        self._missed: set[str] = set()  # requests of failed steps, until their next good one
        self._batch: StepBatch | None = None
        self._req_ids: Sequence[str] = ()
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.mask is not None:
            self.mask.install(program.masks)

    @property
    def num_requests(self) -> int:
        return len(self._slot_of)

    def add_request(self, req_id: str, prompt_tokens: int, tightened: Collection[str] = ()) -> None:
        """Follow a request from its first step on. One that is followed already goes on as it is:
        a preempted request keeps its windows, its masks and its count of positions.

        tightened: policies in audit that this request asked to have enforced
        """
        if self._evaluator is None or req_id in self._slot_of:
            return
        with self.failures.caught(Stage.ADMIT):
            enforced_R = self.program.enforced_for(frozenset(tightened))
            if self.mask is None:
                enforced_R = enforced_R & ~self.program.is_mask_rule
            slot = self._take_slot(req_id)
            self._state.add_request(Admission(slot, prompt_tokens, enforced_R))

    def _take_slot(self, req_id: str) -> int:
        if not self._free_slots:
            raise RuntimeError(
                f"all {self.capacity.max_slots} slots are taken, so request {req_id} is not judged"
            )
        slot = self._free_slots.pop()
        self._slot_of[req_id] = slot
        return slot

    def finish_requests(self, req_ids: Iterable[str]) -> None:
        """Free the slots of requests that ended, not of those that are merely preempted."""
        for req_id in req_ids:
            slot = self._slot_of.pop(req_id, None)
            self._missed.discard(req_id)
            if slot is not None:
                self._free_slots.append(slot)

    @torch.inference_mode()
    def begin_step(
        self, req_ids: Sequence[str], query_start_B1: torch.Tensor, position_T: torch.Tensor
    ) -> None:
        """Say which rows the forward that follows computes, and put their masks in force.

        req_ids: requests in row order
        query_start_B1: [B+1] on the device; first row of each request, and the number of rows
        position_T: [T] on the device; position of each row in its request
        """
        self._batch = None
        if self._evaluator is None:
            return
        self._req_ids = tuple(req_ids)
        with self.failures.caught(Stage.BEGIN_STEP):
            self._state.apply_staged_writes()
            slots_np = np.fromiter(
                (self._slot_of.get(req_id, NULL_SLOT) for req_id in req_ids), np.int64, len(req_ids)
            )
            slots_B = host_to_device(slots_np, self.device)
            batch = StepBatch.of(slots_B, query_start_B1, position_T)
            if self.mask is not None and self.program.masks.num_actions:
                self.mask.set_rows(self._state.masks_at(batch.slot_T, batch.position_T))
            self._batch = batch

    @torch.inference_mode()
    def end_step(self, rejected_B: torch.Tensor | None = None) -> Readback | StepReport | None:
        """Decide, and start the copy of what was decided. None if there is nothing to decide.

        rejected_B: [B] on the device; draft rows at the end of each request that were not accepted
        """
        if self._evaluator is None:
            return None
        batch, req_ids = self._batch, self._req_ids
        self._batch, self._req_ids = None, ()
        if not req_ids or batch is None or self.blind:
            self._report_fault()
            return self._failed_step(req_ids) if req_ids else None
        readback, evaluated = None, False
        with self.failures.caught(Stage.EVALUATE) as attempt:
            signal_TX = self._evaluator.signals(self.tap, len(batch.position_T))
            decisions = self._judge(req_ids, batch, signal_TX, rejected_B)
            evaluated = True
            if self.agreement is not None:
                decisions = self.agreement.agree(decisions)
            readback = Readback(
                self.program.revision, req_ids, decisions, self._copy_stream, self.failures.take()
            )
        if attempt.failed:
            if not evaluated:
                self._report_fault()
            with self.failures.caught(Stage.EVALUATE):
                self._state.distrust(batch.slots_B)
        return self._failed_step(req_ids) if readback is None else readback

    def _judge(
        self,
        req_ids: Sequence[str],
        batch: StepBatch,
        signal_TX: torch.Tensor,
        rejected_B: torch.Tensor | None,
    ) -> StepDecisions:
        """Advance the slots by a step, all of whose signals are known."""
        assert self._evaluator is not None
        if not self._missed.isdisjoint(req_ids):
            start_B = batch.position_T[batch.query_start_B1[:-1]]
            self._state.fill_gaps(batch.slots_B, start_B)
        decisions = self._evaluator.evaluate(signal_TX, batch, self._state, rejected_B)
        self._missed.difference_update(req_ids)
        return decisions

    def _report_fault(self) -> None:
        """The other ranks wait for this one's word, whatever happened to it."""
        if self.agreement is not None:
            with self.failures.caught(Stage.RANKS):
                self.agreement.report_fault()

    def _failed_step(self, req_ids: Sequence[str]) -> StepReport:
        self._missed.update(req_id for req_id in req_ids if req_id in self._slot_of)
        return StepReport.of_failed_step(self.program.revision, req_ids, self.failures.take())

    def idle(self) -> None:
        """The forward that follows computes dummy rows: they are nobody's, and nothing is masked."""
        self._batch, self._req_ids = None, ()
        if self.mask is not None:
            self.mask.clear_rows()
