"""What must have been decided about a request, from the routing that was recorded of it."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from guard.policy.load import load_policies
from guard.policy.model import Block, Mask, PolicySet
from guard.program.applicability import RequestFacts
from guard.program.reference import evaluate
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from tests.integration.offline.policies import FLAGGED
from tests.integration.offline.reading import Case, rows
from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS, TOP_K

TOPOLOGY = Topology(
    "Qwen3MoeForCausalLM",
    tuple(MoELayer(number, NUM_EXPERTS, TOP_K) for number in range(NUM_LAYERS)),
)

Output = dict[str, Any]
Fact = tuple[Any, ...]


@cache
def policy_set(folder: Path) -> PolicySet:
    return load_policies(folder)


def outputs(case: Case) -> list[Output]:
    return [output for batch in case["batches"] for output in batch]


def num_counted(output: Output) -> int:
    """Positions of a request that count: all that were computed of it before its end was decided."""
    if output.get("cancelled"):
        counted: int = output["cancelled"]["counted"]
        return counted
    [sample] = output["samples"]
    if not output["prompt"] or sample["finish_reason"] == "abort":
        return 0
    withheld = sample["finish_reason"] == "content_filter"
    return len(output["prompt"]) + len(sample["tokens"]) - (0 if withheld else 1)


def routing(case: Case, output: Output) -> Routing:
    """Of its positions that count. The same position comes again in a recompute; a rejected draft is
    computed over, so the last time is what counts."""
    latest = {row[0]: row for row in rows(case, output)} if num_counted(output) else {}
    positions = range(num_counted(output))
    assert latest.keys() >= set(positions), "not every position was recorded"
    shape = (-1, NUM_LAYERS, TOP_K)
    return Routing(
        np.array([latest[p][1] for p in positions], dtype=np.int32).reshape(shape),
        np.array([latest[p][2] for p in positions], dtype=np.float32).reshape(shape),
        len(output["prompt"]),
    )


def must_decide(
    policies: PolicySet, case: Case, output: Output, enforced: list[str]
) -> Counter[tuple[Any, ...]]:
    """(policy, rule, position, mode) of each decision, by the slow reference."""
    facts = RequestFacts(enforced=frozenset(enforced))
    verdict = evaluate(policies, TOPOLOGY, routing(case, output), facts=facts)
    return Counter(
        (
            firing.policy,
            firing.rule,
            firing.position,
            "enforce" if firing.policy in enforced else "audit",
        )
        for firing in verdict.firings
    )


def decided(case: Case, output: Output) -> Counter[tuple[Any, ...]]:
    return Counter((d["policy"], d["rule"], d["position"], d["mode"]) for d in _own(case, output))


def facts(case: Case, output: Output) -> list[Fact]:
    """Everything that its decisions say, but for names and times."""
    keys = ("policy", "rule", "mode", "phase", "position", "outcome", "unseen_tokens")
    return sorted(
        (*(d[key] for key in keys), *((e["condition"], e["value"]) for e in d["evidence"]))
        for d in _own(case, output)
    )


def _own(case: Case, output: Output) -> list[dict[str, Any]]:
    return [d for d in case["decisions"] if d["request_id"] == output["request_id"]]


def must_end(policies: PolicySet, case: Case, output: Output, enforced: list[str]) -> str:
    """The outcome of a request, by its decisions; `always` needs none to have masked."""
    if num_counted(output) == 0:
        return "passed"
    acts = {(p.name, r.name): r.then for p, r in policies.ordered_rules()}
    static = {p.name for p, r in policies.ordered_rules() if r.is_static and isinstance(r.then, Mask)}
    own = decided(case, output)
    enforcing = [acts[policy, rule] for policy, rule, _, mode in own if mode == "enforce"]
    if any(isinstance(action, Block) for action in enforcing):
        return "blocked"
    if any(isinstance(action, Mask) for action in enforcing) or not static.isdisjoint(enforced):
        return "masked"
    return "observed" if own else "passed"


def selections_of_flagged(case: Case) -> dict[int, int]:
    """By layer, in all positions that count."""
    totals = np.zeros(NUM_LAYERS, dtype=np.int64)
    for output in outputs(case):
        chosen = routing(case, output).topk_ids
        totals += np.isin(chosen, FLAGGED).sum(axis=(0, 2))
    return dict(enumerate(totals.tolist()))
