"""An engine with draft tokens: worker and engine core around one guard, as a speculating engine is."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch

from guard.device.layout import Capacity
from guard.device.readback import Readback
from guard.events.ledger import Ledger
from guard.events.message import Delta, RuleFacts
from guard.events.rulebook import RuleBook
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import WORD_BITS, Program
from guard.program.step_report import StepReport
from guard.program.verdict import Routing
from guard.runtime import Guard
from tests.conformance.strategies import Case

MAX_ROWS = 64


@dataclass
class Step:
    """accepted: rows that count, the first of which was there already; rejected: drafts behind them."""

    accepted: int
    rejected: int = 0


@dataclass
class Speculated:
    """A request under way. stop_at: the last position that is fed back, because the engine ends it
    there: by a stop token, or its length.

    last_of_step: of each position, the last accepted one of the step that computed it
    masked: for each rule, positions that were computed under its mask when they were accepted
    """

    req_id: str
    routing: Routing
    steps: list[Step]
    stop_at: int
    facts: RequestFacts | None = None
    position: int = 0
    blocked_at: int | None = None
    is_over: bool = False
    last_of_step: dict[int, int] = field(default_factory=dict)
    masked: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))


def rule_facts(program: Program) -> tuple[RuleFacts, ...]:
    """Open to faults, which there are none of here."""
    return tuple(msgspec.structs.replace(RuleFacts.of(rule), on_error="open") for rule in program.rules)


def serve(case: Case, requests: list[Speculated], max_draft_tokens: int) -> Delta | None:
    """Run all requests to their ends; what the ledger says of them. None where there are no rules."""
    program = compile_policies(case.policies, case.topology)
    if not program.rules:
        return None
    capacity = Capacity(MAX_ROWS, 8, program.masks.num_words, max_draft_tokens)
    guard = Guard(program, capacity, torch.device("cpu"))
    ledger = Ledger(
        0,
        RuleBook(
            program.revision,
            rule_facts(program),
            tuple(program.masks.rule.tolist()),
            len(program.sets),
        ),
        clock=float,
        timer=float,
    )
    for request in requests:
        guard.add_request(request.req_id, request.routing.num_prompt_tokens, request.facts)
    # No mask changes what is routed here, which a check of a later step would find.
    with mock.patch("guard.runtime.CHECK_EVERY_STEPS", 10**9):
        while batch := [request for request in requests if not request.is_over]:
            _settle(ledger, batch, _step(guard, batch), [r.steps.pop(0) for r in batch])
    delta = ledger.take(idle=True)
    assert delta is not None
    return delta


def _step(guard: Guard, batch: list[Speculated]) -> StepReport:
    counts = [request.steps[0].accepted + request.steps[0].rejected for request in batch]
    starts = np.cumsum([0, *counts])
    positions = [request.position + np.arange(n) for request, n in zip(batch, counts, strict=True)]
    guard.idle()
    guard.begin_step(
        [request.req_id for request in batch],
        torch.from_numpy(starts),
        torch.from_numpy(np.concatenate(positions)),
    )
    rows = [_rows(request, request.steps[0]) for request in batch]
    for layer, facts in enumerate(guard.program.topology.layers):
        ids, weights = (
            np.concatenate([of_request[part][:, layer, : facts.top_k] for of_request in rows])
            for part in (0, 1)
        )
        guard.tap.record(layer, torch.from_numpy(ids), torch.from_numpy(weights))
    _note_masks(guard, batch, starts)
    rejected = torch.tensor([request.steps[0].rejected for request in batch])
    readback = guard.end_step(rejected)
    assert isinstance(readback, Readback), guard.failures.count
    return readback.result()


def _rows(request: Speculated, step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights; a rejected draft is routed like some other token."""
    accepted = np.arange(request.position, request.position + step.accepted)
    others = np.arange(step.rejected) * 5 % len(request.routing.topk_ids)
    chosen = np.concatenate([accepted, others])
    return request.routing.topk_ids[chosen], request.routing.topk_weights[chosen]


def _note_masks(guard: Guard, batch: list[Speculated], starts: np.ndarray) -> None:
    assert guard.mask is not None
    bits = guard.mask.row_bits_TW.numpy().view(np.uint64)
    for index, request in enumerate(batch):
        accepted = range(request.position, request.position + request.steps[0].accepted)
        for row, position in enumerate(accepted, start=int(starts[index])):
            request.last_of_step[position] = accepted[-1]
            for action, rule in enumerate(guard.program.masks.rule.tolist()):
                if int(bits[row, action // WORD_BITS]) >> (action % WORD_BITS) & 1:
                    named = guard.program.rules[rule]
                    request.masked[named.policy, named.rule].add(position)


def _settle(ledger: Ledger, batch: list[Speculated], report: StepReport, steps: list[Step]) -> None:
    """What the engine core does with a step: a block, a stop, or all tokens are the client's."""
    endings = ledger.begin_step(report, lambda req_ids: {r: row for row, r in enumerate(req_ids)})
    for request, step in zip(batch, steps, strict=True):
        last = request.position + step.accepted - 1
        request.position = last + 1
        if last < request.routing.num_prompt_tokens - 1:
            continue  # inside its prompt: nothing was sampled
        ending = endings.get(request.req_id)
        block = None if ending is None else ending.position
        if block is not None and block <= min(last, request.stop_at):
            request.blocked_at, last = block, block
        last = min(last, request.stop_at)
        ledger.accept(request.req_id, last)
        if last in (request.stop_at, request.blocked_at):
            request.is_over = True
            ledger.finish(request.req_id)
    ledger.end_step()


def told(delta: Delta) -> dict[str, Any]:
    """A delta in a form in which two can be compared: without ids, times and orders."""
    return {
        "decisions": Counter(
            (
                d.request_id, d.policy, d.rule, d.mode, d.phase, d.position, d.outcome, d.unseen_tokens,
                *((e.condition, None if e.value is None else round(e.value, 7)) for e in d.evidence),
            )
            for d in delta.decisions
        ),
        "decision counts": Counter({str(count): 1 for count in delta.decision_counts}),
        "outcomes": delta.outcomes,
        "tokens": {phase: n for phase, n in delta.tokens.items() if n},
        "selections": delta.selections,
        "values": {
            (rule, condition): sorted(round(value, 5) for value in values)
            for rule, condition, values in delta.values
        },
        "masked requests": delta.masked_requests,
        "lost": (delta.dropped, delta.failures),
    }  # fmt: skip
