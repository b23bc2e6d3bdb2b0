"""With draft tokens, accepted and rejected at random, all that is told is what the slow reference says
of the accepted tokens, and what is told where the tokens come one by one."""

from __future__ import annotations

from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.program.applicability import RequestFacts
from guard.program.reference import evaluate
from guard.program.verdict import Routing, Verdict
from tests.conformance.drive import Outcome, prompt_chunks, reference_outcome
from tests.conformance.speculating import Speculated, Step, serve, told
from tests.conformance.strategies import Case, cases, routings

MAX_DRAFTS = 4


@st.composite
def speculated(draw: st.DrawFn, name: str, routing: Routing, facts: RequestFacts) -> Speculated:
    """A prompt in chunks, then steps of up to `MAX_DRAFTS` drafts, some of which are rejected; the
    engine ends the request at the last position or at some earlier one, often inside a step."""
    routing = routing._replace(first_seen=0)
    prompt, total = routing.num_prompt_tokens, len(routing.topk_ids)
    sizes = draw(st.lists(st.integers(1, 8), min_size=prompt, max_size=prompt))
    steps = [Step(size) for size in prompt_chunks(routing, iter(sizes))]
    position = prompt
    while position < total:
        drafts = draw(st.integers(0, MAX_DRAFTS))
        accepted = min(1 + draw(st.integers(0, drafts)), total - position)
        steps.append(Step(accepted, 1 + drafts - accepted))
        position += accepted
    stop_at = total - 1 if draw(st.booleans()) else draw(st.integers(prompt - 1, total - 1))
    return Speculated(name, routing, steps, stop_at, facts)


def _one_by_one(request: Speculated) -> Speculated:
    """The same without drafts."""
    routing = request.routing
    chunks = [step for step in request.steps if step.rejected == 0]
    prompt, output = [], len(routing.topk_ids) - routing.num_prompt_tokens
    left = routing.num_prompt_tokens
    for step in chunks:
        if left > 0:
            prompt.append(Step(step.accepted))
            left -= step.accepted
    steps = [*prompt, *(Step(1) for _ in range(output))]
    return Speculated(request.req_id, routing, steps, request.stop_at, request.facts)


def _verdict(case: Case, request: Speculated) -> Verdict:
    """Of the positions that count, masks coming too late for what the same step had computed ahead."""
    end = request.stop_at + 1
    counted = request.routing._replace(
        topk_ids=request.routing.topk_ids[:end], topk_weights=request.routing.topk_weights[:end]
    )
    return evaluate(
        case.policies,
        case.topology,
        counted,
        facts=request.facts,
        num_computed_ahead=lambda position: request.last_of_step[position] - position,
    )


def _outcome(request: Speculated, verdict: Verdict) -> Outcome:
    end = request.stop_at + 1
    return reference_outcome(verdict, request.routing._replace(topk_ids=request.routing.topk_ids[:end]))


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(cases(), st.data())
def test_counters_are_the_same_where_most_firings_have_no_evidence(
    case: Case, data: st.DataObject
) -> None:
    request = data.draw(speculated("a", case.routing, case.facts))
    expected = serve(case, [_one_by_one(request)], 0)
    with mock.patch("guard.device.evaluate.MAX_EVENTS_PER_STEP", 2):
        delta = serve(case, [request], MAX_DRAFTS)
    if delta is None or expected is None:
        return
    found, wanted = told(delta), told(expected)
    for name in found.keys() - {"decisions", "lost"}:
        assert found[name] == wanted[name]
    assert found["decisions"] <= wanted["decisions"]
    dropped = delta.dropped.get("evaluate", 0)
    assert len(delta.decisions) + dropped == sum(count.count for count in delta.decision_counts)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(cases(), st.data())
def test_what_is_told_of_accepted_drafts_is_what_is_told_of_tokens_one_by_one(
    case: Case, data: st.DataObject
) -> None:
    other = data.draw(routings(case.topology))
    requests = [
        data.draw(speculated("a", case.routing, case.facts)),
        data.draw(speculated("b", other, RequestFacts("b"))),
    ]
    alone = [_one_by_one(request) for request in requests]
    delta = serve(case, requests, MAX_DRAFTS)
    expected = serve(case, alone, 0)
    if delta is None or expected is None:
        return
    assert told(delta) == told(expected)
    for request in requests:
        verdict = _verdict(case, request)
        firings, masked_positions, blocked = _outcome(request, verdict)
        decided = [d for d in delta.decisions if d.request_id == request.req_id]
        assert sorted((d.position, d.policy, d.rule, d.exempt) for d in decided) == sorted(
            (*firing[:3], firing[4]) for firing in firings
        )
        last = request.stop_at if blocked is None else blocked.position
        assert request.blocked_at == (None if blocked is None else blocked.position)
        assert masked_positions == {
            name: kept
            for name, positions in request.masked.items()
            if (kept := {p for p in positions if p <= last})
        }
