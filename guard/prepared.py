"""A program on its way into a running guard: built while the one before it decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guard.device.carry_over import CarryOver
from guard.device.check import LivenessCheck
from guard.device.kept_evidence import KeptColumns
from guard.device.kernels.backends import Judge, make_judge
from guard.device.kernels.choice import Kernels
from guard.device.layout import Capacity
from guard.device.mask import MaskBits
from guard.device.state import SlotState
from guard.errors import ReloadRefusedError
from guard.program.applicability import RulesByFacts
from guard.program.program import WORD_BITS, Program


@dataclass(frozen=True, slots=True)
class PreparedProgram:
    """All that `Guard.install` puts in the place of what there is; see `Guard` for each."""

    program: Program
    rules_by_facts: RulesByFacts
    evaluator: Judge | None
    state: SlotState
    carry_over: CarryOver
    check: LivenessCheck
    mask: MaskBits | None
    kept: KeptColumns | None

    @property
    def new_bytes(self) -> int:
        """Memory that the evidence of cached tokens takes beyond what it had."""
        room = None if self.kept is None else self.kept.room
        return 0 if room is None else sum(tensor.nbytes for tensor in room)


def make_evaluator(
    program: Program, capacity: Capacity, device: torch.device, kernels: Kernels | None = None
) -> Judge | None:
    """None where there is nothing to evaluate. kernels: see `make_judge`"""
    return make_judge(program, capacity, device, kernels) if program.rules else None


def check_fits(program: Program, running: Program, capacity: Capacity, *, masking: bool) -> None:
    """Raises ReloadRefusedError for a program that cannot follow the running one in its buffers."""
    if program.topology != running.topology:
        raise ReloadRefusedError(
            "the program was compiled for another model than the one that is served"
        )
    check_follows(program, running)
    provisioned = capacity.mask_words * WORD_BITS
    if masking and program.masks.num_words > capacity.mask_words:
        raise ReloadRefusedError(
            f"the policies have {program.masks.num_actions} mask actions, but the server was started "
            f"with room for {provisioned}; have fewer, or start it with --mask-actions "
            f"{program.masks.num_actions}"
        )


def check_follows(program: Program, running: Program) -> None:
    """Raises ReloadRefusedError for a program that was compiled to follow another one."""
    if program.generation != running.generation + 1:
        raise ReloadRefusedError(
            f"the program was compiled to follow generation {program.generation - 1}, but generation "
            f"{running.generation} is in force; compile it again"
        )
