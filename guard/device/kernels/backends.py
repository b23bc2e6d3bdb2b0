"""Which code judges: kernels where there are some for the device and the program, else torch."""

from __future__ import annotations

from typing import Protocol

import torch

from guard.device.evaluate import StepEvaluator
from guard.device.kernels.choice import Kernels, has_kernels
from guard.device.kernels.native.judge import NativeJudge
from guard.device.layout import Capacity
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.program.program import Program


class Judge(Protocol):
    """What makes a step's decisions of its routing: `StepEvaluator`, or kernels that do the same on the
    same state, bit for bit but for logarithms and exponentials."""

    def signals(self, tap: RoutingTap, num_rows: int) -> torch.Tensor:
        """int64 [T, columns]: the evidence of the tap's first `num_rows` rows."""

    def evaluate(
        self,
        evidence_TX: torch.Tensor,
        batch: StepBatch,
        state: SlotState,
        rejected_B: torch.Tensor | None = None,
        *,
        computed_B: torch.Tensor | None = None,
    ) -> StepDecisions:
        """Advance `state` by the rows of `batch`; see `StepEvaluator.evaluate`."""


def make_judge(
    program: Program, capacity: Capacity, device: torch.device, kernels: Kernels | None = None
) -> Judge:
    """kernels: None: as the environment variable `MOE_GUARD_KERNELS` says, else `auto`"""
    drafts = capacity.max_draft_tokens
    if has_kernels(device, kernels):
        if device.type == "cuda":
            from guard.device.kernels.triton_judge.judge import TritonJudge

            judge = TritonJudge(program, device, drafts)
            judge.warm_up()
            return judge
        if not drafts:
            return NativeJudge(program)
    return StepEvaluator(program, device, drafts)
