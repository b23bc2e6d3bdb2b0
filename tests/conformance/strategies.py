"""Hypothesis strategies for a whole question to an evaluator: a model, policies over it, a routing.

Numbers are drawn from few and round ones, so that values meet their thresholds exactly, rules turn
again and again, and two rules fire at one position. `cases()` is what a conformance test wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from guard.policy.model import (
    ALL_REQUESTS,
    Action,
    All,
    AnyOf,
    Block,
    Condition,
    ExpertEntry,
    ExpertSet,
    Expression,
    Mask,
    MaskMethod,
    MaskUntil,
    Mode,
    Not,
    Observe,
    Persist,
    Phase,
    Policy,
    PolicySet,
    Rule,
    Severity,
)
from guard.program.applicability import RequestFacts
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from tests.conformance.condition_strategies import LOCATION, condition
from tests.conformance.drawing import GATE_NUMERATORS, ONE_IN_FOUR, WEIGHTS, digits, pick, subset
from tests.conformance.request_strategies import exceptions, facts, match

MAX_LAYERS, MAX_EXPERTS, MAX_PROMPT, MAX_OUTPUT = 3, 8, 12, 12
MASK_UNTILS: tuple[MaskUntil, ...] = ("clear", "clear", "request-end", 1, 2, 3, 5)


class Case(NamedTuple):
    topology: Topology
    policies: PolicySet
    routing: Routing
    facts: RequestFacts


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """1 to 3 MoE layers, dense ones between them, each with its own number of experts and top-k."""
    number, layers = -1, []
    for _ in range(draw(st.integers(1, MAX_LAYERS))):
        number += draw(st.integers(1, 3))
        num_experts = draw(st.integers(3, MAX_EXPERTS))
        largest = pick(draw, [min(3, num_experts - 1), num_experts - 1])
        layers.append(MoELayer(number, num_experts, draw(st.integers(1, largest))))
    return Topology("TestMoeForCausalLM", tuple(layers))


@st.composite
def routings(draw: st.DrawFn, topology: Topology) -> Routing:
    """A whole prompt and some output. Ids are distinct in a row; some have weight zero.

    Every position repeats one of a few kinds of token, so that a request changes topic and returns.
    """
    kinds = [_token_row(draw, topology) for _ in range(draw(st.integers(2, 5)))]
    num_prompt = 1 + digits(draw, [MAX_PROMPT])[0]
    num_output = digits(draw, [MAX_OUTPUT + 1])[0]
    first_seen = draw(st.integers(0, num_prompt - 1)) if pick(draw, ONE_IN_FOUR) else 0
    of_prompt = digits(draw, [len(kinds)] * num_prompt)
    of_output = digits(draw, [len(kinds)] * num_output)
    topk_ids = np.stack([kinds[n][0] for n in of_prompt + of_output])
    topk_weights = np.stack([kinds[n][1] for n in of_prompt + of_output])
    return Routing(topk_ids, topk_weights, num_prompt, first_seen)


def _token_row(draw: st.DrawFn, topology: Topology) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """One token's ids and gate weights, [L, K]. One integer stands for a row: draws are slow."""
    shape = (len(topology.layers), topology.max_top_k)
    topk_ids, topk_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    with_gaps = pick(draw, ONE_IN_FOUR)
    for index, layer in enumerate(topology.layers):
        k = layer.top_k
        remaining = list(range(layer.num_experts))
        for rank, choice in enumerate(digits(draw, [len(remaining) - r for r in range(k)])):
            topk_ids[index, rank] = remaining.pop(choice)
        for rank, choice in enumerate(digits(draw, [len(GATE_NUMERATORS)] * k)):
            topk_weights[index, rank] = GATE_NUMERATORS[choice] / 256
        for rank, gap in enumerate(digits(draw, [6] * k) if with_gaps else []):
            if gap == 1:  # as zero experts come back: expert 0, and so perhaps twice
                topk_ids[index, rank] = 0
            if gap in (1, 2):
                topk_weights[index, rank] = 0.0
    return topk_ids, topk_weights


def _expert_set(draw: st.DrawFn, topology: Topology, name: str) -> ExpertSet:
    """Entries over several layers that may overlap, or one a layer, each with its own weights."""
    weights = WEIGHTS if draw(st.booleans()) else (1.0,)
    layers = subset(draw, topology.layers)
    entries = []
    if draw(st.booleans()):
        weight_of = [weights[n] for n in digits(draw, [len(weights)] * MAX_EXPERTS)]
        for _ in range(draw(st.integers(1, 2))):
            some = subset(draw, layers)
            ids = subset(draw, range(min(layer.num_experts for layer in some)))
            numbers = tuple(layer.number for layer in some)
            entries.append(ExpertEntry(numbers, {i: weight_of[i] for i in ids}, LOCATION))
    else:
        for layer in layers:
            ids = subset(draw, range(layer.num_experts))
            choices = digits(draw, [len(weights)] * len(ids))
            of_layer = {i: weights[n] for i, n in zip(ids, choices, strict=True)}
            entries.append(ExpertEntry((layer.number,), of_layer, LOCATION))
    return ExpertSet(name, tuple(entries), LOCATION)


def _mask_set(draw: st.DrawFn, topology: Topology, name: str, method: MaskMethod) -> ExpertSet:
    """Any number of such sets together can be honoured: rerouted ones leave every layer its top_k
    live experts, forced ones are at most top_k, and any expert may be dropped."""
    entries = []
    for layer in subset(draw, topology.layers):
        maskable = {
            MaskMethod.REROUTE: range(layer.top_k, layer.num_experts),
            MaskMethod.FORCE: range(layer.top_k),
        }
        ids = subset(draw, maskable.get(method, range(layer.num_experts)))
        entries.append(ExpertEntry((layer.number,), dict.fromkeys(ids, 1.0), LOCATION))
    return ExpertSet(name, tuple(entries), LOCATION)


def _expression(
    draw: st.DrawFn, topology: Topology, experts: Sequence[ExpertSet], depth: int = 2
) -> Expression:
    shape = pick(draw, ["condition", "condition", "condition", "all", "any", "not"])
    if depth == 0 or shape == "condition":
        return condition(draw, topology, experts)
    if shape == "not":
        return Not(_expression(draw, topology, experts, depth - 1))
    num_children = draw(st.integers(1, 3))
    children = tuple(_expression(draw, topology, experts, depth - 1) for _ in range(num_children))
    return All(children) if shape == "all" else AnyOf(children)


def _labelled(node: Expression, seen: Counter[str]) -> Expression:
    """The same expression with the labels that a loader gives: `rate`, `rate#2`, as written."""
    match node:
        case Condition():
            seen[node.kind] += 1
            nth = seen[node.kind]
            return replace(node, label=str(node.kind) if nth == 1 else f"{node.kind}#{nth}")
        case All(children):
            return All(tuple(_labelled(child, seen) for child in children))
        case AnyOf(children):
            return AnyOf(tuple(_labelled(child, seen) for child in children))
        case Not(child):
            return Not(_labelled(child, seen))


_MaskSets = Sequence[tuple[MaskMethod, ExpertSet]]


def _action(draw: st.DrawFn, mask_sets: _MaskSets) -> Action:
    # Blocks are rare: each hides what the other rules would have done behind it.
    name = pick(draw, ["mask", "mask", "mask", "mask", "observe", "block"])
    if name == "observe":
        return Observe()
    if name == "block":
        return Block("Stopped.")
    method, experts = pick(draw, mask_sets)
    return Mask(experts, LOCATION, method=method, until=pick(draw, MASK_UNTILS))


def _rule(
    draw: st.DrawFn,
    name: str,
    topology: Topology,
    experts: Sequence[ExpertSet],
    mask_sets: _MaskSets,
) -> Rule:
    of = draw(st.integers(1, 8)) if pick(draw, ONE_IN_FOUR) else 1
    return Rule(
        name=name,
        when=_labelled(_expression(draw, topology, experts), Counter()),
        then=_action(draw, mask_sets),
        location=LOCATION,
        phase=pick(draw, [Phase.ANY, *Phase]),
        persist=Persist(hits=draw(st.integers(1, of)), of=of),
        match=match(draw) if pick(draw, ONE_IN_FOUR) else ALL_REQUESTS,
    )


@st.composite
def policy_sets(draw: st.DrawFn, topology: Topology) -> PolicySet:
    """1 to 4 policies of 1 to 3 rules, sorted as the loader sorts them."""
    policies = []
    for number in range(draw(st.integers(1, 4))):
        experts = [_expert_set(draw, topology, f"read-{n}") for n in range(draw(st.integers(1, 3)))]
        methods = [pick(draw, MaskMethod) for _ in range(2)]
        mask_sets = [
            (method, _mask_set(draw, topology, f"masked-{n}", method))
            for n, method in enumerate(methods)
        ]
        names = [f"rule-{n}" for n in range(draw(st.integers(1, 3)))]
        policies.append(
            Policy(
                name=f"policy-{number}",
                location=LOCATION,
                mode=pick(draw, [Mode.ENFORCE, Mode.ENFORCE, Mode.AUDIT, Mode.OFF]),
                severity=pick(draw, Severity),
                experts={
                    expert_set.name: expert_set for expert_set in [*experts, *(s for _, s in mask_sets)]
                },
                rules=tuple(_rule(draw, name, topology, experts, mask_sets) for name in names),
                exceptions=exceptions(draw, names),
            )
        )
    policies.sort(key=lambda policy: (-policy.severity.rank, policy.name))
    return PolicySet(tuple(policies), revision="0")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A model, policies over it, one request's routing, and what is known of the request."""
    topology = draw(topologies())
    policies = draw(policy_sets(topology))
    audits = [policy.name for policy in policies.policies if policy.mode is Mode.AUDIT]
    return Case(topology, policies, draw(routings(topology)), facts(draw, audits))
