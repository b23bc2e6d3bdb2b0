"""A step never makes the host wait for the device, whatever is judged in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import _disable_current_modes

import guard.device.state
import guard.runtime
from guard.device.evaluate import StepEvaluator
from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.layout import Capacity
from guard.device.start import TorchStart
from guard.device.state import host_to_device
from guard.program.program import Program
from tests.conformance.drive import Driven, prompt_chunks, run
from tests.conformance.strategies import Case, cases
from tests.support.no_waiting import NoWaiting


class _Watched(guard.runtime.Guard):
    def begin_step(self, *args: Any, **kwargs: Any) -> Any:
        with NoWaiting():
            return super().begin_step(*args, **kwargs)

    def end_step(self, *args: Any, **kwargs: Any) -> Any:
        with NoWaiting():
            return super().end_step(*args, **kwargs)


def _twin(program: Program, capacity: Capacity, device: torch.device) -> StepEvaluator | None:
    return StepEvaluator(program, device, capacity.max_draft_tokens) if program.rules else None


def _pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    with _disable_current_modes():  # the one way from the host: its source is pinned
        return host_to_device(array, device)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_no_operation_of_a_step_waits_for_its_numbers(case: Case) -> None:
    chunks = prompt_chunks(case.routing, iter([3] * 12))
    requests = [Driven("a", case.routing, chunks, case.facts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KERNELS_VARIABLE, "torch")  # the way that steps on a device take
        patch.setattr("tests.conformance.drive.Guard", _Watched)
        patch.setattr(guard.runtime, "make_evaluator", _twin)
        patch.setattr(guard.runtime, "make_start", lambda tap, mask, _: TorchStart(tap, mask))
        for module in (guard.runtime, guard.device.state):
            patch.setattr(module, "host_to_device", _pinned)
        run(case.policies, case.topology, requests, padding_rows=2)


@pytest.mark.parametrize(
    "waits",
    [
        lambda numbers: numbers.sum().item(),
        lambda numbers: numbers.nonzero(),
        lambda numbers: numbers[numbers > 1],
        lambda numbers: torch.tensor([1, 2]) + numbers[:2],
        lambda numbers: bool((numbers > 1).any()),
    ],
    ids=["item", "nonzero", "bool mask", "list", "truth"],
)
def test_what_waits_is_refused(waits: Any) -> None:
    numbers = torch.arange(4)
    with NoWaiting(), pytest.raises(AssertionError, match="wait"):
        waits(numbers)
