"""Drives a `Guard` as an engine does: requests in steps, prompts in chunks, rows beside other rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from guard.device.layout import Capacity
from guard.policy.model import Policy, PolicySet, Rule
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import WORD_BITS
from guard.program.step_report import NEVER, EventColumn, RequestColumn, StepReport
from guard.program.topology import Topology
from guard.program.verdict import BlockedAt, Evidence, Firing, Routing, Verdict
from guard.runtime import Guard
from tests.support.opened import opened

MAX_ROWS = 64
_OFF_THE_EDGE = 3.7e-9
"""Added before rounding: values like 1/256 would lie between two rounded ones."""


@dataclass
class Driven:
    """A request under way. chunks: the numbers of tokens that its steps bring."""

    req_id: str
    routing: Routing
    chunks: list[int]
    facts: RequestFacts | None = None
    position: int = 0
    events: list[Firing] = field(default_factory=list)
    masked_positions: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    block: tuple[int, int] | None = None  # (position, rule)
    tokens: tuple[int, int] = (0, 0)
    unseen: int = 0

    @property
    def num_positions(self) -> int:
        return len(self.routing.topk_ids)


class Outcome(NamedTuple):
    """A verdict in the form in which device and reference can be compared."""

    firings: list[tuple[int, str, str, tuple[tuple[str, float | None], ...], bool]]
    masked_positions: dict[tuple[str, str], set[int]]
    blocked: BlockedAt | None


def run(
    policies: PolicySet,
    topology: Topology,
    requests: Sequence[Driven],
    *,
    padding_rows: int = 0,
    max_slots: int = 8,
) -> Guard:
    """Run all requests to their ends, each step bringing the next chunk of every unfinished one."""
    program = compile_policies(policies, topology)
    capacity = Capacity(MAX_ROWS, max_slots, program.masks.num_words)
    guard = Guard(program, capacity, torch.device("cpu"))
    ordered = list(policies.ordered_rules())
    for request in requests:
        request.position = request.routing.first_seen
        guard.add_request(request.req_id, request.routing.num_prompt_tokens, request.facts)
    while batch := [r for r in requests if r.position < r.num_positions]:
        step(guard, batch, ordered, padding_rows)
    return guard


def step(
    guard: Guard,
    batch: Sequence[Driven],
    ordered: Sequence[tuple[Policy, Rule]],
    padding_rows: int = 0,
    kv_slots: np.ndarray | None = None,
) -> None:
    """kv_slots: where the step writes its rows' KV, if the guard keeps evidence beside it."""
    counts = [min(r.chunks.pop(0) if r.chunks else 1, r.num_positions - r.position) for r in batch]
    starts = np.cumsum([0, *counts])
    positions = np.concatenate(
        [np.arange(r.position, r.position + n) for r, n in zip(batch, counts, strict=True)]
    )
    for number, moe_layer in enumerate(guard.program.topology.layers):
        # What the last step left behind must not matter.
        guard.tap.topk_ids_TLK[:, number, : moe_layer.top_k] = 2
        guard.tap.topk_weights_TLK[:, number, : moe_layer.top_k] = 0.5
    guard.begin_step([r.req_id for r in batch], torch.from_numpy(starts), torch.from_numpy(positions))
    if kv_slots is not None:
        padded_slots = np.concatenate([kv_slots, np.full(padding_rows, -1)])
        guard.place_rows(torch.from_numpy(padded_slots))
    for layer in range(len(guard.program.topology.layers)):
        top_k = guard.program.topology.layers[layer].top_k
        ids = np.concatenate(
            [
                r.routing.topk_ids[r.position : r.position + n, layer, :top_k]
                for r, n in zip(batch, counts, strict=True)
            ]
        )
        weights = np.concatenate(
            [
                r.routing.topk_weights[r.position : r.position + n, layer, :top_k]
                for r, n in zip(batch, counts, strict=True)
            ]
        )
        padded_ids = np.concatenate([ids, np.ones((padding_rows, top_k), ids.dtype)])
        padded_weights = np.concatenate([weights, np.ones((padding_rows, top_k), weights.dtype)])
        guard.tap.record(layer, torch.from_numpy(padded_ids), torch.from_numpy(padded_weights))
    _note_masks(guard, batch, starts, positions)
    report = opened(guard.end_step(), guard)
    if report is not None:
        assert report.failed == guard.blind, guard.failures.count
    if report is not None and not report.failed:
        _note_report(guard, batch, report, ordered)
    for request, count in zip(batch, counts, strict=True):
        request.position += count


def _note_masks(
    guard: Guard, batch: Sequence[Driven], starts: np.ndarray, positions: np.ndarray
) -> None:
    assert guard.mask is not None
    bits = guard.mask.row_bits_TW
    assert not bits[len(positions) :].any(), "rows behind the step are masked"
    for index, request in enumerate(batch):
        for row in range(starts[index], starts[index + 1]):
            for action, rule in enumerate(guard.program.masks.rule):
                word = int(bits[row, action // WORD_BITS])
                if word >> (action % WORD_BITS) & 1:
                    named = guard.program.rules[rule]
                    request.masked_positions[named.policy, named.rule].add(int(positions[row]))


def _note_report(
    guard: Guard,
    batch: Sequence[Driven],
    report: StepReport,
    ordered: Sequence[tuple[Policy, Rule]],
) -> None:
    for event, values in zip(report.events_V, report.values_V, strict=True):
        request = batch[event[EventColumn.REQUEST]]
        policy, rule = ordered[event[EventColumn.RULE]]
        evidence = tuple(
            Evidence(condition.label, float(value), condition.threshold)
            for condition, value in zip(rule.conditions(), values, strict=False)
        )
        position, exempt = int(event[EventColumn.POSITION]), bool(event[EventColumn.EXEMPT])
        request.events.append(Firing(position, policy.name, rule.name, evidence, exempt))
    for request, row in zip(batch, report.requests_B, strict=True):
        prompt, output = request.tokens
        request.tokens = (
            prompt + int(row[RequestColumn.PROMPT_TOKENS]),
            output + int(row[RequestColumn.OUTPUT_TOKENS]),
        )
        request.unseen = int(row[RequestColumn.UNSEEN])
        if row[RequestColumn.BLOCK_KEY] < NEVER:
            request.block = divmod(int(row[RequestColumn.BLOCK_KEY]), len(guard.program.rules))


def device_outcome(request: Driven, ordered: Sequence[tuple[Policy, Rule]]) -> Outcome:
    blocked = None
    last = request.num_positions
    if request.block is not None:
        last, rule = request.block
        blocked = BlockedAt(last, ordered[rule][0].name, ordered[rule][1].name)
    return Outcome(
        [_comparable(firing) for firing in request.events if firing.position <= last],
        {
            name: kept
            for name, positions in request.masked_positions.items()
            if (kept := {p for p in positions if p <= last})
        },
        blocked,
    )


def reference_outcome(verdict: Verdict, routing: Routing) -> Outcome:
    last = len(routing.topk_ids) - 1
    if verdict.blocked is not None:
        last = min(last, verdict.blocked.position)
    masked: dict[tuple[str, str], set[int]] = defaultdict(set)
    for mask in verdict.masks:
        stop = last + 1 if mask.stop is None else min(mask.stop, last + 1)
        masked[mask.policy, mask.rule] |= set(range(max(mask.start, routing.first_seen), stop))
    return Outcome(
        [_comparable(firing) for firing in verdict.firings],
        {name: positions for name, positions in masked.items() if positions},
        verdict.blocked,
    )


def _comparable(
    firing: Firing,
) -> tuple[int, str, str, tuple[tuple[str, float | None], ...], bool]:
    evidence = tuple(
        (e.condition, None if math.isnan(e.value) else round(e.value + _OFF_THE_EDGE, 7))
        for e in firing.evidence
    )
    return firing.position, firing.policy, firing.rule, evidence, firing.exempt


def prompt_chunks(routing: Routing, sizes: Iterator[int]) -> list[int]:
    """Sizes of the prompt's chunks, then single output tokens."""
    chunks, left = [], routing.num_prompt_tokens - routing.first_seen
    while left > 0:
        size = min(left, next(sizes))
        chunks.append(size)
        left -= size
    return chunks
