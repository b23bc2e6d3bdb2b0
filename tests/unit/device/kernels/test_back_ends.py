"""Which kernels a GPU gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from guard.device.kernels import backends
from guard.device.kernels.choice import KERNELS_VARIABLE
from guard.device.layout import Capacity
from guard.device.start import TorchStart, make_start
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from tests.unit.device.driving import COUNT, TOPOLOGY, policy_text, rule_text

_GPU = torch.device("cuda")
_PROGRAM = compile_policies(parse_policies(policy_text(rule_text(COUNT))), TOPOLOGY)
_TAP: Any = SimpleNamespace(topk_ids_TLK=SimpleNamespace(device=_GPU))
_JUDGE = "guard.device.kernels.triton_judge.judge.TritonJudge"
_START = "guard.device.kernels.triton_judge.start.TritonStart"


def test_a_gpu_is_judged_by_triton_that_was_warmed_up() -> None:
    with mock.patch(_JUDGE) as judge, mock.patch(_START) as start:
        made = backends.make_judge(_PROGRAM, Capacity(8, 2), _GPU)
        begun = make_start(_TAP, None, mock.sentinel.state)
    assert made is judge.return_value
    assert judge.mock_calls[1:] == [mock.call().warm_up()]
    assert begun is start.return_value
    assert start.mock_calls[1:] == [mock.call().warm_up(mock.sentinel.state)]


def test_torch_judges_a_gpu_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    with mock.patch(_JUDGE) as judge, mock.patch.object(backends, "StepEvaluator") as twin:
        made = backends.make_judge(_PROGRAM, Capacity(8, 2), _GPU)
        begun = make_start(_TAP, None, mock.sentinel.state)
    assert made is twin.return_value
    judge.assert_not_called()
    assert isinstance(begun, TorchStart)
