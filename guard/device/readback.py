"""What one step decided, on its way from the device to the host, beside the step's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from guard.device.drafts import DraftDecisions
from guard.program.step_report import DraftReport, EventColumn, StepReport


class StepDecisions(NamedTuple):
    """`StepReport`'s arrays while they are on the device; events beyond `num_events` are unused."""

    requests_B: torch.Tensor
    masked_BW: torch.Tensor
    extremes_BC: torch.Tensor
    events_V: torch.Tensor
    values_V: torch.Tensor
    num_events: torch.Tensor
    drafts: DraftDecisions | None = None


class Readback:
    """A copy to the host that is under way. `result` waits for it, and for nothing else.

    On CUDA it runs on a stream of its own behind the decisions, into pinned memory of its own, so
    the next step can begin before the host looks.
    """

    def __init__(
        self,
        revision: str,
        req_ids: Sequence[str],
        decisions: StepDecisions,
        copy_stream: torch.cuda.Stream | None,
        failures: Mapping[str, int],
    ) -> None:
        self._revision = revision
        self._req_ids = tuple(req_ids)
        self._failures = failures
        self._done: torch.cuda.Event | None = None
        self._keep_alive: StepDecisions | None = None
        if copy_stream is None:
            self._host = decisions
            return
        self._keep_alive = decisions  # until the copy stream has read it
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            self._host = _pinned(decisions)
            self._done = torch.cuda.Event(blocking=True)
            self._done.record(copy_stream)

    def result(self) -> StepReport:
        if self._done is not None:
            self._done.synchronize()
            self._done = self._keep_alive = None
        host = self._host
        num_events = int(host.num_events)
        kept = min(num_events, len(host.events_V))
        events_V, values_V = host.events_V[:kept].numpy(), host.values_V[:kept].numpy()
        columns = (EventColumn.RULE, EventColumn.POSITION, EventColumn.REQUEST)
        order = np.lexsort([events_V[:, column] for column in columns])
        return StepReport(
            self._revision,
            self._req_ids,
            host.requests_B.numpy(),
            host.masked_BW.numpy(),
            host.extremes_BC.numpy(),
            events_V[order],
            values_V[order],
            num_events,
            self._failures,
            drafts=None if host.drafts is None else DraftReport(*(a.numpy() for a in host.drafts)),
        )


def _pinned(decisions: StepDecisions) -> StepDecisions:
    *tensors, drafts = decisions
    pinned_drafts = None if drafts is None else DraftDecisions(*map(_to_pinned, drafts))
    return StepDecisions._make([*map(_to_pinned, tensors), pinned_drafts])


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
