"""Which code judges: kernels where there are some for the device and the program, else torch."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Literal, Protocol, get_args

import torch

from guard.device.evaluate import StepEvaluator
from guard.device.kernels.numba_judge import compiled
from guard.device.kernels.numba_judge.judge import NumbaJudge
from guard.device.layout import Capacity
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import SlotState
from guard.device.tap import RoutingTap
from guard.errors import GuardError
from guard.program.program import Program

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "MOE_GUARD_KERNELS"
"""`auto`, or `torch` for those who do not trust the kernels: then torch alone judges."""

Kernels = Literal["auto", "torch"]


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
    if (kernels or _chosen_kernels()) == "auto" and device.type == "cpu":
        if not compiled.IS_AVAILABLE:
            _say_that_numba_is_missing()
        elif NumbaJudge.covers(program, drafts):
            return NumbaJudge(program)
    return StepEvaluator(program, device, drafts)


def _chosen_kernels() -> str:
    chosen = os.environ.get(KERNELS_VARIABLE) or "auto"
    if chosen not in get_args(Kernels):
        raise GuardError(f"{KERNELS_VARIABLE}={chosen} is not known; set it to auto or to torch")
    return chosen


@cache
def _say_that_numba_is_missing() -> None:
    logger.info("numba is not installed, so torch judges each step, which takes longer")
