"""Distributions and co-activation in a real engine: decided is what the slow reference decides of the
rows that passed the routers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guard.policy.load import load_policies
from guard.program.reference import evaluate
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from tests.integration.offline.engines import MODES, Engines
from tests.integration.offline.reading import decisions, rows
from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS, TOP_K

pytestmark = pytest.mark.vllm

POLICY = "spread"
TOPOLOGY = Topology(
    "Qwen3MoeForCausalLM", tuple(MoELayer(n, NUM_EXPERTS, TOP_K) for n in range(NUM_LAYERS))
)


def _routing(case: dict[str, Any], output: dict[str, Any]) -> Routing:
    judged = rows(case, output)
    assert [row[0] for row in judged] == list(range(len(judged)))
    ids = np.array([row[1] for row in judged], dtype=np.int32)
    return Routing(ids, np.ones(ids.shape, np.float32), len(output["prompt"]))


@pytest.mark.parametrize(
    ("mode", "name"),
    [*((mode, "unmasked") for mode in MODES), ("eager", "masked"), ("v2", "masked"), ("v2", "long")],
)
def test_decisions_on_distributions_are_the_references(engines: Engines, mode: str, name: str) -> None:
    policies = load_policies(engines.folder / "main")
    [spread] = [policy for policy in policies.policies if policy.name == POLICY]
    alone = replace(policies, policies=(spread,))
    case = engines.case(f"{mode}-guarded", "main", name)
    fired = set()
    for batch in case["batches"]:
        for output in batch:
            verdict = evaluate(alone, TOPOLOGY, _routing(case, output))
            found = decisions(case, output, POLICY)
            assert [(d["rule"], d["position"]) for d in found] == [
                (firing.rule, firing.position) for firing in verdict.firings
            ]
            for decision, firing in zip(found, verdict.firings, strict=True):
                [said], [expected] = decision["evidence"], firing.evidence
                assert said["value"] == pytest.approx(expected.value, rel=1e-12)
            fired |= {firing.rule for firing in verdict.firings}
    assert fired == {rule.name for rule in spread.rules}, "not every rule fired in some request"
