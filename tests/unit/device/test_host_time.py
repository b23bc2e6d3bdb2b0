"""A report says what its step took of the host, where somebody measures it."""

from __future__ import annotations

import pytest
import torch

from guard.device.readback import Readback
from guard.program.step_report import HostSeconds
from tests.unit.device.driving import COUNT, FLAGGED, OTHER, Engine, policy_text, rule_text


def readback(expert: int) -> Readback:
    engine = Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", 1)
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([0]))
    for layer in range(2):
        engine.guard.tap.record(layer, torch.tensor([[expert, 7]]), torch.full((1, 2), 0.5))
    pending = engine.guard.end_step()
    assert isinstance(pending, Readback)
    return pending


@pytest.mark.parametrize("expert", [OTHER, FLAGGED], ids=["quiet", "with-an-event"])
def test_the_time_to_read_it_is_added(expert: int) -> None:
    pending = readback(expert)
    pending.host = HostSeconds(1.0, 2.0)
    report = pending.result()

    assert report.num_events == (expert == FLAGGED)
    assert report.host is not None
    assert report.host[:2] == (1.0, 2.0)
    assert 0 < report.host.report < 1


def test_nobody_measures_it_by_default() -> None:
    assert readback(OTHER).result().host is None
