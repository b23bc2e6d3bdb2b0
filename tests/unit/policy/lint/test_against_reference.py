"""A rule that lint calls dead never fires, and one that it calls always true fires, on any routing."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from guard.policy import parse_policies
from guard.policy.lint import Code, lint
from guard.policy.model import PolicySet
from guard.program.model_shape import shape_of
from guard.program.reference import evaluate
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing

TOPOLOGY = Topology("X", (MoELayer(0, 4, 2), MoELayer(2, 3, 1)))
SETS = {
    "a": "{layer: 0, experts: [0, 1, 2]}",
    "b": "{layer: 0, experts: [3]}, {layer: 2, experts: [1]}",
    "w": "{layer: 0, weights: {0: 0.5, 1: -0.5, 3: 0.25}}, {layer: 2, weights: {0: 1, 2: -1}}",
}
THRESHOLDS = [-1, -0.5, 0, 0.25, 0.3333333333333333, 0.5, 0.6666666666666666, 0.75, 1, 1.5, 2, 3, 4, 8]
WINDOWS = ["token", 2, 3, "prompt", "output", "request"]


@st.composite
def conditions(draw: st.DrawFn) -> str:
    kind = draw(
        st.sampled_from(
            [*("count", "rate", "mass", "score", "coactivation"), *("entropy", "concentration")]
        )
    )
    words = [
        f"over: {draw(st.sampled_from(WINDOWS))}",
        f"{draw(st.sampled_from(['above', 'atLeast', 'below', 'atMost']))}: "
        f"{draw(st.sampled_from(THRESHOLDS))}",
    ]
    if kind not in ("entropy", "concentration"):
        words.append(f"experts: {draw(st.sampled_from(sorted(SETS)))}")
    if kind == "score":
        words.append(f"bias: {draw(st.sampled_from([0, 0.25, -1]))}")
    if kind == "coactivation":
        words.append(f"{draw(st.sampled_from(['members', 'layers']))}: {draw(st.integers(1, 4))}")
    return f"{{{kind}: {{{', '.join(words)}}}}}"


@st.composite
def wholes(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    children = draw(st.lists(inner, min_size=1, max_size=3))
    word = draw(st.sampled_from(["all", "any", "not"]))
    return f"{{not: {children[0]}}}" if word == "not" else f"{{{word}: [{', '.join(children)}]}}"


EXPRESSIONS = st.recursive(conditions(), wholes, max_leaves=4)


@st.composite
def policies(draw: st.DrawFn) -> PolicySet:
    sets = ", ".join(f"{name}: [{entries}]" for name, entries in SETS.items())
    rules = [
        f"    - {{name: r{number}, when: {draw(EXPRESSIONS)}, "
        f"match: {{phase: {draw(st.sampled_from(['any', 'prompt', 'output']))}}}, "
        f"persist: {{hits: {draw(st.sampled_from([1, 1, 2]))}, of: 2}}}}\n"
        for number in range(6)
    ]
    return parse_policies(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
        f"  experts: {{{sets}}}\n  rules:\n" + "".join(rules)
    )


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    positions = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    ids = np.full((positions, 2, 2), -1, dtype=np.int32)
    weights = np.zeros((positions, 2, 2), dtype=np.float32)
    favourite = random.integers(0, 3)
    for position in range(positions):
        for index, layer in enumerate(TOPOLOGY.layers):
            order = random.permutation(layer.num_experts)
            if random.random() < 0.6:  # extremes are where a bound can be wrong
                order = np.array([favourite, *(e for e in order if e != favourite)])
            ids[position, index, : layer.top_k] = order[: layer.top_k]
            share = random.dirichlet(np.ones(layer.top_k)).astype(np.float32)
            share[random.random(layer.top_k) < 0.1] = 0
            weights[position, index, : layer.top_k] = share
    return Routing(ids, weights, draw(st.integers(1, positions)))


SAID: Counter[str] = Counter()


@given(policies(), st.lists(routings(), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_no_rule_fires_that_is_said_never_to(policy_set: PolicySet, requests: list[Routing]) -> None:
    found = lint(policy_set, shape=shape_of(TOPOLOGY))
    dead = {f.message.split("'")[1] for f in found if f.code is Code.NEVER_FIRES}
    sure = {f.message.split("'")[1] for f in found if f.code is Code.ALWAYS_FIRES}
    SAID.update(dead=len(dead), sure=len(sure))

    for routing in requests:
        fired = {firing.rule for firing in evaluate(policy_set, TOPOLOGY, routing).firings}
        assert not fired & dead
        # A request long enough for every window and every persist, in both phases.
        if 4 <= routing.num_prompt_tokens <= len(routing.topk_ids) - 4:
            mass_free = {r.name for r in policy_set.policies[0].rules if "mass" not in str(r.when)}
            assert sure & mass_free <= fired


def test_the_claims_were_put_to_the_test() -> None:
    """Of the random rules enough are dead and sure that the property above means something."""
    if SAID:
        assert SAID["dead"] > 30
        assert SAID["sure"] > 8
