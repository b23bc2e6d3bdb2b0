"""Many requests' routing -> what a program decides about each, by the data plane's own evaluator.

Requests are fed as an engine feeds them: slots, steps of mixed rows, prompts in chunks, one output
position a step where a decision changes what comes next. Routing is taken as given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.evaluate import StepEvaluator
from guard.device.layout import NULL_SLOT, Capacity
from guard.device.readback import StepDecisions
from guard.device.rows import StepBatch
from guard.device.state import Admission, SlotState
from guard.device.tap import RoutingTap
from guard.program.applicability import RequestFacts, RulesFor, rules_for
from guard.program.program import ActionKind, Bools, Program, unpack_bits
from guard.program.step_report import NEVER, EventColumn, RequestColumn
from guard.program.verdict import BlockedAt, Evidence, Firing, MaskInterval, Routing, Verdict

MAX_ROWS: Final = 2048
MAX_REQUESTS: Final = 256
STATE_BYTES: Final = 256 << 20
"""For the state of all requests that are under way at once: long windows take fewer of them."""

ROUTING_BYTES: Final = 256 << 20
"""For the routing of those requests; a single one may be larger."""

_DEVICE = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """A request as it was routed, and what was known of it when it came."""

    routing: Routing
    facts: RequestFacts = field(default_factory=RequestFacts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was decided about a request.

    verdict: of the rules that apply to it
    rules: which those are, and which of them act
    tokens, unseen: positions up to the last one that counts, with and without evidence
    extremes_C: float64; each condition's value nearest to or furthest beyond its threshold, NaN where
        it was never known
    """

    verdict: Verdict
    rules: RulesFor
    tokens: int
    unseen: int
    extremes_C: NDArray[np.float64]


@dataclass(slots=True)
class _Live:
    """A request under way."""

    number: int
    routing: Routing
    seen_P: NDArray[np.int64]  # 1 where the position was seen
    slot: int
    rules: RulesFor
    acts: bool
    position: int
    in_force_A: Bools
    firings: list[Firing] = field(default_factory=list)
    masks: list[tuple[int, int, int]] = field(default_factory=list)  # start, stop, action
    open_masks: dict[int, int] = field(default_factory=dict)  # action -> start
    block: tuple[int, int] | None = None  # position, rule
    extremes_C: NDArray[np.float64] | None = None
    unseen: int = 0

    @property
    def end(self) -> int:
        """The position behind the last one that counts."""
        num_positions = len(self.routing.topk_ids)
        return num_positions if self.block is None else min(num_positions, self.block[0] + 1)


class OfflineEvaluator:
    """Evaluates one program. Memory is bounded, whatever the number of requests.

    requests are taken from an iterator as slots become free, and outcomes are yielded in its order
    """

    def __init__(self, program: Program, *, max_rows: int = MAX_ROWS) -> None:
        self.program = program
        self._max_rows = max_rows
        # They are evaluated at the last row of a step alone, as an engine's output comes.
        self._reads_distributions = program.distributions.num_conditions > 0
        self._evaluator: StepEvaluator | None = None
        if program.rules:
            self._max_requests = _requests_at_once(program)
            capacity = Capacity(max_rows, self._max_requests, program.masks.num_words)
            self._evaluator = StepEvaluator(program, _DEVICE, all_values=True)
            self._state = SlotState(program, capacity, _DEVICE)
            self._tap = RoutingTap(program.topology, capacity, _DEVICE)
        acting = [rule.action is not ActionKind.OBSERVE for rule in program.rules]
        static_R = np.zeros(len(acting), dtype=np.bool_)
        static_R[program.masks.rule[program.masks.static]] = True
        self._acts_R = np.array(acting, dtype=np.bool_) & ~static_R

    @torch.inference_mode()
    def outcomes(self, requests: Iterable[OfflineRequest]) -> Iterator[Outcome]:
        """One for each request, in their order. One iteration at a time: it uses all slots."""
        if self._evaluator is None:
            yield from map(self._without_rules, requests)
            return
        source, numbers = iter(requests), count()
        free = list(range(self._max_requests, NULL_SLOT, -1))
        live: list[_Live] = []
        done: dict[int, Outcome] = {}
        next_number, exhausted = 0, False
        while True:
            while free and not exhausted and _has_room(live) and len(done) < 4 * self._max_requests:
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    live.append(self._admit(next(numbers), request, free.pop()))
            if live:
                self._step(live)
            for ended in [one for one in live if one.position >= one.end]:
                live.remove(ended)
                free.append(ended.slot)
                done[ended.number] = self._finished(ended)
            while next_number in done:
                yield done.pop(next_number)
                next_number += 1
            if exhausted and not live:
                return

    @torch.inference_mode()
    def values_at(self, request: OfflineRequest, position: int) -> NDArray[np.float64]:
        """[C] every condition's value at a position; NaN where it is unknown, or where its rule is not
        evaluated: in another phase, or for another request."""
        routing = request.routing
        values_C = np.full(self.program.conditions.num_conditions, np.nan)
        if self._evaluator is None or not routing.first_seen <= position < len(routing.topk_ids):
            return values_C
        one = self._admit(0, request, 1)
        while one.position < position:
            self._run([(one, min(self._max_rows, position - one.position))])
        self._state.apply_staged_writes()
        self._state.extreme_SC.fill_(float("nan"))
        self._run([(one, 1)])
        values_C[:] = self._state.extreme_SC[one.slot].numpy()
        return values_C

    def _without_rules(self, request: OfflineRequest) -> Outcome:
        routing = request.routing
        seen = sum(map(routing.is_seen, range(len(routing.topk_ids))))
        return Outcome(
            Verdict((), (), None),
            rules_for((), request.facts),
            len(routing.topk_ids),
            len(routing.topk_ids) - seen,
            np.zeros(0),
        )

    def _admit(self, number: int, request: OfflineRequest, slot: int) -> _Live:
        routing, program = request.routing, self.program
        rules = rules_for(program.rules, request.facts)
        self._state.add_request(Admission(slot, routing.num_prompt_tokens, rules))
        acts = bool((rules.enforced_R & self._acts_R).any())
        in_force_A = np.zeros(program.masks.num_actions, dtype=np.bool_)
        seen_P = np.ones(len(routing.topk_ids), dtype=np.int64)
        seen_P[list(routing.unseen)] = 0
        one = _Live(number, routing, seen_P, slot, rules, acts, routing.first_seen, in_force_A)
        self._start_static_masks(one)
        return one

    def _start_static_masks(self, one: _Live) -> None:
        masks = self.program.masks
        for action in np.flatnonzero(masks.static & one.rules.enforced_R[masks.rule]).tolist():
            in_prompt = self.program.rule_table.in_prompt[masks.rule[action]]
            start = 0 if in_prompt else one.routing.num_prompt_tokens
            tokens = int(masks.tokens[action])
            if tokens:
                one.masks.append((start, start + tokens, action))
            else:
                one.open_masks[action] = start

    def _step(self, live: Sequence[_Live]) -> None:
        """Each request's next rows, as many as a step holds, in turn where they do not all fit."""
        left = self._max_rows
        parts: list[tuple[_Live, int]] = []
        fair = max(1, left // len(live))
        for one in live:
            num_left = len(one.routing.topk_ids) - one.position
            in_prompt = one.routing.num_prompt_tokens - one.position
            if one.acts or self._reads_distributions:
                num_left = min(num_left, in_prompt if in_prompt > 0 else 1)
            rows = min(num_left, max(fair, left - (len(live) - len(parts) - 1) * fair), left)
            if rows > 0:
                parts.append((one, rows))
                left -= rows
        self._note(parts, self._run(parts))

    def _run(self, parts: Sequence[tuple[_Live, int]]) -> StepDecisions:
        assert self._evaluator is not None
        self._state.apply_staged_writes()
        starts = np.cumsum([0, *[rows for _, rows in parts]])
        num_rows = int(starts[-1])
        position_T = np.empty(num_rows, dtype=np.int64)
        seen_T = np.empty(num_rows, dtype=np.int64)
        ids_TLK = self._tap.topk_ids_TLK.numpy()
        weights_TLK = self._tap.topk_weights_TLK.numpy()
        for (one, rows), start in zip(parts, starts[:-1].tolist(), strict=True):
            span = slice(one.position, one.position + rows)
            ids_TLK[start : start + rows] = one.routing.topk_ids[span]
            weights_TLK[start : start + rows] = one.routing.topk_weights[span]
            position_T[start : start + rows] = np.arange(span.start, span.stop)
            seen_T[start : start + rows] = one.seen_P[span]
            one.position += rows
        slots_B = torch.tensor([one.slot for one, _ in parts], dtype=torch.int64)
        batch = StepBatch.of(slots_B, torch.from_numpy(starts), torch.from_numpy(position_T))
        evidence_TX = self._evaluator.signals(self._tap, num_rows)
        return self._evaluator.evaluate(
            evidence_TX * torch.from_numpy(seen_T)[:, None], batch, self._state
        )

    def _note(self, parts: Sequence[tuple[_Live, int]], decisions: StepDecisions) -> None:
        program, num_events = self.program, int(decisions.num_events)
        events_V = decisions.events_V[:num_events].numpy()
        values_V = decisions.values_V[:num_events].numpy()
        order = np.lexsort([events_V[:, c] for c in (EventColumn.RULE, EventColumn.POSITION)])
        for event in order.tolist():
            row, number, position = events_V[event, : EventColumn.POSITION + 1].tolist()
            one, rule = parts[row][0], program.rules[number]
            values = values_V[event].tolist()
            evidence = tuple(map(Evidence, rule.condition_labels, values, rule.thresholds))
            exempt = bool(events_V[event, EventColumn.EXEMPT])
            one.firings.append(Firing(position, rule.policy, rule.rule, evidence, exempt))
        block_key_B = decisions.requests_B[:, RequestColumn.BLOCK_KEY].tolist()
        unseen_B = decisions.requests_B[:, RequestColumn.UNSEEN].tolist()
        in_force_BA = unpack_bits(decisions.masked_BW.numpy(), program.masks.num_actions)
        for (one, _), block_key, unseen, in_force_A in zip(
            parts, block_key_B, unseen_B, in_force_BA, strict=True
        ):
            one.unseen = unseen
            if block_key < NEVER:
                one.block = divmod(block_key, len(program.rules))
            if one.acts:
                self._note_masks(one, in_force_A & ~program.masks.static)

    def _note_masks(self, one: _Live, in_force_A: Bools) -> None:
        """in_force_A: at the position that comes next, of masks that are not static."""
        for action in np.flatnonzero(in_force_A != one.in_force_A).tolist():
            if in_force_A[action]:
                one.open_masks[action] = max(one.position, one.routing.num_prompt_tokens)
            else:
                one.masks.append((one.open_masks.pop(action), one.position, action))
        one.in_force_A = in_force_A

    def _finished(self, one: _Live) -> Outcome:
        program, end = self.program, one.end
        rule_of = program.masks.rule.tolist()
        masks = [
            (start, rule_of[action], None if stop > end else stop) for start, stop, action in one.masks
        ] + [(start, rule_of[action], None) for action, start in one.open_masks.items()]
        blocked = None
        if one.block is not None:
            position, number = one.block
            blocked = BlockedAt(position, program.rules[number].policy, program.rules[number].rule)
            masks = [mask for mask in masks if mask[0] <= position]
        verdict = Verdict(
            tuple(firing for firing in one.firings if firing.position < end),
            tuple(
                MaskInterval(program.rules[rule].policy, program.rules[rule].rule, start, stop)
                for start, rule, stop in sorted(masks, key=lambda mask: mask[:2])
            ),
            blocked,
        )
        extremes_C = self._state.extreme_SC[one.slot].numpy().copy()
        return Outcome(verdict, one.rules, end, one.unseen, extremes_C)


def result_of(program: Program, outcome: Outcome) -> str:
    """blocked over masked over unjudged over observed over passed."""
    verdict = outcome.verdict
    if verdict.blocked is not None:
        return "blocked"
    enforced_masks = {
        (rule.policy, rule.rule)
        for rule, enforced in zip(program.rules, outcome.rules.enforced_R, strict=True)
        if enforced and rule.action is ActionKind.MASK
    }
    fired = {(firing.policy, firing.rule) for firing in verdict.firings}
    if verdict.masks or fired & enforced_masks:
        return "masked"
    if outcome.unseen:
        return "unjudged"
    return "observed" if fired else "passed"


def _has_room(live: Sequence[_Live]) -> bool:
    held = sum(one.routing.topk_ids.nbytes + one.routing.topk_weights.nbytes for one in live)
    return held < ROUTING_BYTES


def _requests_at_once(program: Program) -> int:
    probe = SlotState(program, Capacity(1, 1, program.masks.num_words), _DEVICE)
    tensors = [tensor for tensor in vars(probe).values() if isinstance(tensor, torch.Tensor)]
    bytes_per_slot = sum(tensor.nbytes for tensor in tensors) // probe.num_slots
    return max(1, min(MAX_REQUESTS, STATE_BYTES // max(1, bytes_per_slot)))
