"""What one step decided, on its way from the device to the host, beside the step's tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.drafts import DraftDecisions
from guard.device.findings import CheckFindings
from guard.device.packed import PackedDecisions, PinnedPool
from guard.program.step_report import (
    DraftReport,
    EventColumn,
    HostSeconds,
    RequestColumn,
    RoutingCheck,
    StepReport,
    StepSummary,
)

_ADDED = np.array([RequestColumn.PROMPT_TOKENS, RequestColumn.OUTPUT_TOKENS])
"""What a report counts of the step alone, beside the selections of named sets."""


class Summarised(NamedTuple):
    """requests_B: what the summary is of: not of what others may have made of it since"""

    requests_B: torch.Tensor
    summary: StepSummary


class StepDecisions(NamedTuple):
    """`StepReport`'s arrays while they are on the device. events_V: all of the step's firings, of which
    the first ones have `values_V`; those beyond `num_events` are unused."""

    requests_B: torch.Tensor
    masked_BW: torch.Tensor
    extremes_BC: torch.Tensor
    events_V: torch.Tensor
    values_V: torch.Tensor
    num_events: torch.Tensor
    drafts: DraftDecisions | None = None
    packed: PackedDecisions | None = None  # the same, where one buffer holds them
    summarised: Summarised | None = None


class ReplayedDecisions(NamedTuple):
    """What was decided on cached rows, before the step's own. requests_np: the places in the step of
    the requests that `decisions` counts."""

    requests_np: NDArray[np.int64]
    decisions: StepDecisions


class StepFacts(NamedTuple):
    """All that leaves the device with a step. findings: None in steps that are not checked."""

    decisions: StepDecisions
    findings: CheckFindings | None


class Readback:
    """A copy to the host that is under way. `result` waits for it, and for nothing else.

    revision: of the program that decided
    req_ids: the requests of the step
    host: what the step took of the host until here, where somebody measured it

    On CUDA it runs on a stream of its own behind the decisions, into pinned memory that no other copy
    under way has, so the next step can begin before the host looks.
    """

    host: HostSeconds | None = None

    def __init__(
        self,
        revision: str,
        req_ids: Sequence[str],
        facts: StepFacts,
        copy_stream: torch.cuda.Stream | None,
        failures: Mapping[str, int],
        replayed: Sequence[ReplayedDecisions] = (),
        layers: tuple[int, ...] = (),
        pool: PinnedPool | None = None,
    ) -> None:
        """layers: the model's own numbers of the MoE layers, for what the check found"""
        self.revision = revision
        self._layers = layers
        self.req_ids = tuple(req_ids)
        self._failures = failures
        self._done: torch.cuda.Event | None = None
        self._keep_alive: CheckFindings | None = None
        self._copy_stream = copy_stream
        self._replayed_requests = [part.requests_np for part in replayed]
        self._pool = PinnedPool() if pool is None else pool
        self._borrowed: list[torch.Tensor] = []
        parts = self._parts = [*(part.decisions for part in replayed), facts.decisions]
        if copy_stream is None:
            self._host, self._findings = parts, facts.findings
            return
        self._keep_alive = facts.findings  # until the copy stream has read them
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            self._host = [self._copied(part) for part in parts]
            self._findings = (
                None if facts.findings is None else CheckFindings(*map(_to_pinned, facts.findings))
            )
            self._done = torch.cuda.Event(blocking=True)
            self._done.record(copy_stream)

    def _copied(self, part: StepDecisions) -> StepDecisions:
        if part.packed is None:
            return _pinned(part)
        host, buffer = copy_packed(part, part.packed, self._pool)
        self._borrowed.append(buffer)
        return host

    def result(self) -> StepReport:
        began = time.perf_counter()
        if self._done is not None:
            self._done.synchronize()
            self._done = self._keep_alive = None
            began = time.perf_counter()  # what came before was the device's time
        elif len(self._host) == 1 and not (
            len(self._host[0].events_V) and int(self._host[0].num_events)
        ):
            return self._quiet(began)
        more = self._events_without_values()
        self._parts = []
        own = self._host[-1]
        requests_B = own.requests_B.numpy()
        events, values, num_events = [], [], 0
        for part, requests_np in zip(self._host, [*self._replayed_requests, None], strict=True):
            num_events += int(part.num_events)
            kept = min(int(part.num_events), len(part.values_V))
            events_V = part.events_V[:kept].numpy()
            if requests_np is not None:
                # The rest of a request's facts are as of its last row, which is in the step itself.
                requests_B[requests_np[:, None], _ADDED] += part.requests_B.numpy()[:, _ADDED]
                requests_B[requests_np, RequestColumn.NUM :] += part.requests_B.numpy()[
                    :, RequestColumn.NUM :
                ]
                events_V[:, EventColumn.REQUEST] = requests_np[events_V[:, EventColumn.REQUEST]]
            events.append(events_V)
            values.append(part.values_V[:kept].numpy())
        events_V, values_V = np.concatenate(events), np.concatenate(values)
        columns = (EventColumn.RULE, EventColumn.POSITION, EventColumn.REQUEST)
        order = np.lexsort([events_V[:, column] for column in columns])
        masked_BW, extremes_BC = own.masked_BW.numpy(), own.extremes_BC.numpy()
        if self._borrowed:
            requests_B, masked_BW = requests_B.copy(), masked_BW.copy()
            extremes_BC = extremes_BC.copy()
        report = StepReport(
            self.revision,
            self.req_ids,
            requests_B,
            masked_BW,
            extremes_BC,
            events_V[order],
            values_V[order],
            num_events,
            self._failures,
            more_events_V=more,
            drafts=None if own.drafts is None else DraftReport(*(a.numpy() for a in own.drafts)),
            check=self._check(),
            host=self._host_seconds(began),
        )
        while self._borrowed:
            self._pool.give_back(self._borrowed.pop())
        return report

    def _quiet(self, began: float) -> StepReport:
        """Of a step in which nothing fired, as in most, whose decisions are on the host already."""
        own = self._host[0]
        return StepReport(
            self.revision,
            self.req_ids,
            own.requests_B.numpy(),
            own.masked_BW.numpy(),
            own.extremes_BC.numpy(),
            own.events_V[:0].numpy(),
            own.values_V[:0].numpy(),
            0,
            self._failures,
            drafts=None if own.drafts is None else DraftReport(*(a.numpy() for a in own.drafts)),
            check=self._check(),
            summary=self._summary(own),
            host=self._host_seconds(began),
        )

    def _host_seconds(self, began: float) -> HostSeconds | None:
        return self.host and self.host._replace(report=time.perf_counter() - began)

    @staticmethod
    def _summary(own: StepDecisions) -> StepSummary | None:
        if own.summarised is None or own.summarised.requests_B is not own.requests_B:
            return None
        return own.summarised.summary

    def _events_without_values(self) -> NDArray[np.int64]:
        """Firings for which the copy has no room. There are seldom any: they are fetched now."""
        found = [np.zeros((0, EventColumn.NUM), dtype=np.int64)]
        stream = self._copy_stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for number, (part, host) in enumerate(zip(self._parts, self._host, strict=True)):
                kept, num_events = len(host.values_V), int(host.num_events)
                if num_events <= kept:
                    continue
                events_V = part.events_V[kept:num_events].cpu().numpy()
                if number < len(self._replayed_requests):
                    requests_np = self._replayed_requests[number]
                    events_V[:, EventColumn.REQUEST] = requests_np[events_V[:, EventColumn.REQUEST]]
                found.append(events_V)
        return np.concatenate(found)

    def _check(self) -> RoutingCheck | None:
        if self._findings is None:
            return None
        return RoutingCheck(self._layers, *(tensor.numpy() for tensor in self._findings))


def _pinned(decisions: StepDecisions) -> StepDecisions:
    first_events_V = decisions.events_V[: len(decisions.values_V)]
    *tensors, drafts, _, _ = decisions._replace(events_V=first_events_V)
    pinned_drafts = None if drafts is None else DraftDecisions(*map(_to_pinned, drafts))
    return StepDecisions._make([*map(_to_pinned, tensors), pinned_drafts])


def copy_packed(
    decisions: StepDecisions, packed: PackedDecisions, pool: PinnedPool
) -> tuple[StepDecisions, torch.Tensor]:
    """On the host once the copy is done, as views of a buffer of `pool`, which is returned beside."""
    num_words = packed.packing.head_words
    buffer = pool.take(num_words)
    head = buffer[:num_words].copy_(packed.buffer[:num_words], non_blocking=True)
    host = StepDecisions(*packed.packing.views(head))
    if decisions.requests_B is not packed.requests_B:  # other ranks had a say in it
        host = host._replace(requests_B=_to_pinned(decisions.requests_B))
    return host, buffer


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
