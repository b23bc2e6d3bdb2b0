"""Run by `test_triton_judge.py` in a process whose guards are `judged_by_kernels`."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from guard.device.evaluate import StepEvaluator
from guard.device.kernels.triton_judge.judge import TritonJudge
from guard.device.kernels.triton_judge.start import TritonStart
from guard.device.layout import Capacity
from guard.device.tap import RoutingTap
from guard.policy import parse_policies
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.reference import evaluate
from tests.conformance.drive import (
    Driven,
    device_outcome,
    prompt_chunks,
    reference_outcome,
    run,
)
from tests.conformance.strategies import Case, cases, routings
from tests.support.judged_by_kernels import judged
from tests.unit.device.driving import (
    BLOCK,
    COUNT,
    FLAGGED,
    MASK,
    TOPOLOGY,
    Engine,
    policy_text,
    rule_text,
)

_CHUNKS = st.lists(st.integers(1, 6), min_size=12, max_size=12)


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), _CHUNKS, st.data())
def test_kernels_and_twin_decide_alike_in_any_batch_and_chunking(
    case: Case, chunk_sizes: list[int], data: st.DataObject
) -> None:
    program = compile_policies(case.policies, case.topology)
    assume(not program.distributions.num_conditions)  # those are the twin's
    other = data.draw(routings(case.topology))
    requests = [
        Driven("a", case.routing, prompt_chunks(case.routing, iter(chunk_sizes)), case.facts),
        Driven("b", other, [1] * other.num_prompt_tokens, RequestFacts("b")),
    ]
    run(case.policies, case.topology, requests, padding_rows=3)
    ordered = list(case.policies.ordered_rules())
    for request in requests:
        verdict = evaluate(case.policies, case.topology, request.routing, facts=request.facts)
        assert device_outcome(request, ordered) == reference_outcome(verdict, request.routing)


def test_ids_that_are_no_expert_and_weights_that_are_no_number_count_as_the_twin_says() -> None:
    text = policy_text(
        rule_text("{count: {experts: f, over: request, atLeast: 1}}")
        + rule_text("{mass: {experts: f, over: request, above: 0.1}}", name="mass")
        + rule_text("{coactivation: {experts: f, layers: 1, over: request, atLeast: 1}}", name="c")
    )
    program = compile_policies(parse_policies(text), TOPOLOGY)
    device, num_rows = torch.device("cpu"), 64
    tap = RoutingTap(TOPOLOGY, Capacity(num_rows, 1), device)
    seeded = torch.Generator().manual_seed(0)
    shape = tap.topk_ids_TLK.shape
    tap.topk_ids_TLK[:] = torch.randint(-2, 10, shape, generator=seeded, dtype=torch.int32)
    weights = torch.rand(shape, generator=seeded)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    is_odd = torch.rand(shape, generator=seeded) < 0.6
    odds = odd[torch.randint(0, len(odd), shape, generator=seeded)]
    tap.topk_weights_TLK[:] = odds.where(is_odd, weights)
    evidence_TX = TritonJudge(program, device).signals(tap, num_rows)
    assert torch.equal(evidence_TX, StepEvaluator(program, device).signals(tap, num_rows))
    assert (evidence_TX.amax(dim=0) > 0).all()


def test_warming_up_leaves_nothing_behind() -> None:
    engine = Engine(policy_text(rule_text(COUNT, MASK) + rule_text(COUNT, BLOCK, name="b")))
    program, device = engine.program, torch.device("cpu")
    before = engine.step({"a": (0, [FLAGGED])})
    TritonJudge(program, device).warm_up()
    TritonStart(engine.guard.tap, engine.guard.mask).warm_up(engine.guard._state)
    after = engine.step({"a": (0, [FLAGGED])})
    assert after.requests_B.tolist() == before.requests_B.tolist()
    assert not any(engine.masked_rows(4))


def test_the_kernels_decided_steps_and_kept_rows() -> None:
    assert judged["kernel"] > 100, judged
    assert judged["kept"] > 20, judged
    assert judged["begun"] > 100, judged
    assert judged["admitted"] > 30, judged
