"""What a request takes from the KV cache is decided on as if it had computed it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from guard.device.layout import Capacity
from guard.program.compile import compile_policies
from guard.program.reference import evaluate
from guard.program.verdict import Routing
from guard.runtime import Guard
from tests.conformance.drive import (
    MAX_ROWS,
    Driven,
    Outcome,
    device_outcome,
    prompt_chunks,
    reference_outcome,
    step,
)
from tests.conformance.strategies import MAX_OUTPUT, MAX_PROMPT, Case, cases

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
NUM_BLOCKS = 3 * (MAX_PROMPT + MAX_OUTPUT)


@dataclass
class Plan:
    """How three requests of the same text, one after the other, share the blocks of the one before.

    taken: tokens that each takes from the cache, in blocks of `block_size` of the one before
    starts: the step in which each begins; one may begin in the step that computes what it takes
    blind_steps: steps of which nothing is seen
    """

    block_size: int
    chunks: list[list[int]]
    taken: list[int]
    starts: list[int]
    replay_rows: int
    blind_steps: set[int] = field(default_factory=set)


def _chunks(prompt: int, first: int, sizes: list[int]) -> list[int]:
    """The chunks of a prompt whose first tokens come from the cache."""
    nothing = np.zeros((0, 0, 0))
    of_nobody = Routing(nothing.astype(np.int32), nothing.astype(np.float32), prompt, first)
    return prompt_chunks(of_nobody, iter(sizes))


@st.composite
def plans(draw: st.DrawFn, prompt: int, *, blind: bool) -> Plan:
    block_size = draw(st.integers(1, 4))
    most = (prompt - 1) // block_size
    sizes = st.lists(st.integers(1, 6), min_size=12, max_size=12)
    chunks: list[list[int]] = []
    taken, starts = [0], [0]
    done_at: dict[int, int] = {}
    for number in range(3):
        if number:
            taken.append(block_size * draw(st.integers(0, most)))
            # At the earliest in the step in which the one before computes the last token taken.
            earliest = done_at.get(taken[-1] - 1, starts[-1]) if taken[-1] else starts[-1]
            starts.append(max(starts[-1], earliest) + draw(st.integers(0, 1)))
        own = _chunks(prompt, taken[-1], draw(sizes))
        chunks.append(own)
        position = taken[-1]
        done_at = {p: at for p, at in done_at.items() if p < position}
        for at, size in enumerate(own):
            done_at |= dict.fromkeys(range(position, position + size), starts[-1] + at)
            position += size
    blind_steps = {draw(st.integers(0, starts[1] - 1))} if blind and starts[1] > 0 else set()
    return Plan(block_size, chunks, taken, starts, draw(st.integers(1, 9)), blind_steps)


def run(case: Case, plan: Plan) -> tuple[list[Driven], list[Routing]]:
    """The requests as they were driven, and what was to be seen of each."""
    program = compile_policies(case.policies, case.topology)
    capacity = Capacity(MAX_ROWS, 8, program.masks.num_words, plan.replay_rows)
    guard = Guard(program, capacity, torch.device("cpu"))
    kept = guard.keep_evidence(NUM_BLOCKS, plan.block_size)
    ordered = list(case.policies.ordered_rules())
    free = list(range(NUM_BLOCKS))
    if kept is not None:  # others' evidence is everywhere
        kept.narrow_KX.fill_(1)
        kept.wide_KX.fill_(1)
    text = case.routing._replace(first_seen=0)
    requests = [
        Driven(name, text, list(chunks), case.facts, position=taken)
        for name, chunks, taken in zip("abc", plan.chunks, plan.taken, strict=True)
    ]
    blocks: list[list[int]] = []
    unseen: list[set[int]] = [set(), set(), set()]
    for number in range(1000):
        for who in [i for i, start in enumerate(plan.starts) if start == number]:
            hit = plan.taken[who] // plan.block_size
            own = -(-len(text.topk_ids) // plan.block_size) - hit
            new, free = free[:own], free[own:]
            blocks.append([*(blocks[who - 1][:hit] if who else []), *new])
            guard.add_request(requests[who].req_id, text.num_prompt_tokens, case.facts)
            guard.take_from_cache(requests[who].req_id, blocks[who], plan.taken[who])
            unseen[who] |= {p for p in unseen[who - 1] if p < plan.taken[who]} if who else set()
            if kept is not None:
                kept.forget(new)
        batch = [
            i
            for i, r in enumerate(requests)
            if plan.starts[i] <= number and r.position < r.num_positions
        ]
        if not batch:
            break
        guard.blind = number in plan.blind_steps and bool(program.rules)
        slots = []
        for i in batch:
            request = requests[i]
            count = request.chunks[0] if request.chunks else 1
            rows = range(request.position, min(request.position + count, request.num_positions))
            slots += [
                blocks[i][p // plan.block_size] * plan.block_size + p % plan.block_size for p in rows
            ]
            if guard.blind:
                unseen[i] |= set(rows)
        step(guard, [requests[i] for i in batch], ordered, 2, np.array(slots, dtype=np.int64))
    return requests, [text._replace(unseen=frozenset(positions)) for positions in unseen]


def check(case: Case, plan: Plan) -> None:
    requests, texts = run(case, plan)
    ordered = list(case.policies.ordered_rules())
    for request, text, taken in zip(requests, texts, plan.taken, strict=True):
        if plan.blind_steps and request is requests[0]:
            continue  # it went on unjudged; what the others took from it is the question
        verdict = evaluate(case.policies, case.topology, text, facts=case.facts)
        assert _from(taken, device_outcome(request, ordered)) == _from(
            taken, reference_outcome(verdict, text)
        )
        if ordered:
            prompt, total = text.num_prompt_tokens, request.num_positions
            seen = [p for p in range(total) if text.is_seen(p)]
            assert request.tokens == (
                sum(p < prompt for p in seen),
                sum(p >= prompt for p in seen),
            )
            assert request.unseen == total - len(seen)


def _from(first: int, outcome: Outcome) -> Outcome:
    """Without the masks of positions that were not computed."""
    kept = {
        name: later
        for name, positions in outcome.masked_positions.items()
        if (later := {p for p in positions if p >= first})
    }
    return outcome._replace(masked_positions=kept)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.data())
def test_decisions_are_those_of_the_whole_text_whatever_part_came_from_the_cache(
    case: Case, data: st.DataObject
) -> None:
    check(case, data.draw(plans(case.routing.num_prompt_tokens, blind=False)))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.data())
def test_cached_tokens_of_a_step_that_nobody_saw_are_unseen(case: Case, data: st.DataObject) -> None:
    check(case, data.draw(plans(case.routing.num_prompt_tokens, blind=True)))


@settings(max_examples=12, phases=NO_SHRINKING, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_chunk_size_decides_alike_with_none_half_or_all_of_the_prompt_cached(case: Case) -> None:
    prompt = case.routing.num_prompt_tokens
    for chunk in range(1, prompt + 1):
        for taken in {0, prompt // 2, prompt - 1}:
            chunks = [_chunks(prompt, first, [chunk] * prompt) for first in (0, taken, taken)]
            starts = [0, len(chunks[0]), len(chunks[0])]
            check(case, Plan(1, chunks, [0, taken, taken], starts, replay_rows=chunk))
