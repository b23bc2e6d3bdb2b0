"""The device evaluation says what the slow reference says, however the tokens arrive."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.program.applicability import RequestFacts
from guard.program.reference import evaluate
from tests.conformance.drive import (
    Driven,
    device_outcome,
    prompt_chunks,
    reference_outcome,
    run,
)
from tests.conformance.strategies import Case, cases, routings

CHUNKS = st.lists(st.integers(1, 12), min_size=12, max_size=12)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), CHUNKS, st.data())
def test_decisions_equal_the_references_in_any_batch_and_chunking(
    case: Case, chunk_sizes: list[int], data: st.DataObject
) -> None:
    other = data.draw(routings(case.topology))
    requests = [
        Driven("a", case.routing, prompt_chunks(case.routing, iter(chunk_sizes)), case.facts),
        Driven("b", other, prompt_chunks(other, iter(reversed(chunk_sizes))), RequestFacts("b")),
        Driven("c", case.routing, [1] * case.routing.num_prompt_tokens, case.facts),
    ]
    run(case.policies, case.topology, requests, padding_rows=3)
    ordered = list(case.policies.ordered_rules())
    for request in requests:
        verdict = evaluate(case.policies, case.topology, request.routing, facts=request.facts)
        assert device_outcome(request, ordered) == reference_outcome(verdict, request.routing)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), CHUNKS)
def test_every_token_counts_once_and_unseen_ones_are_said_to_be(
    case: Case, chunk_sizes: list[int]
) -> None:
    routing = case.routing
    request = Driven("a", routing, prompt_chunks(routing, iter(chunk_sizes)))
    guard = run(case.policies, case.topology, [request], padding_rows=5)
    if guard.program.rules:
        num_positions = len(routing.topk_ids)
        assert request.tokens == (
            routing.num_prompt_tokens - routing.first_seen,
            num_positions - routing.num_prompt_tokens,
        )
        assert request.unseen == routing.first_seen
