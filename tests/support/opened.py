"""What a guard says of a step, whatever it comes in."""

from __future__ import annotations

from dataclasses import replace
from typing import overload

from guard.device.readback import Readback
from guard.program.step_report import PackedFlag, PackedReport, RoutingCheck, StepReport
from guard.runtime import Guard


@overload
def opened(pending: Readback | PackedReport | StepReport, guard: Guard) -> StepReport: ...
@overload
def opened(pending: Readback | PackedReport | StepReport | None, guard: Guard) -> StepReport | None: ...
def opened(pending: Readback | PackedReport | StepReport | None, guard: Guard) -> StepReport | None:
    """With what the running check found, nothing included."""
    if isinstance(pending, Readback):
        return pending.result()
    if not isinstance(pending, PackedReport):
        return pending
    report = pending.unpacked()
    if not pending.flags & PackedFlag.CHECKED:
        return report
    findings = guard._check.nothing_found(len(pending.req_ids))
    return replace(report, check=RoutingCheck(guard._layers, *(found.numpy() for found in findings)))
