"""How many series a server shows to Prometheus: bounded by model and policies, whatever the traffic."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry

from guard.events.message import (
    HOST_PARTS,
    DecisionCount,
    Delta,
    Health,
    Hello,
    LayerLoad,
    Load,
    SetFacts,
)
from guard.events.metrics import GuardMetrics
from guard.events.outcomes import OUTCOMES
from guard.failures import Stage
from tests.support.synthetic_metrics import rule

LAYERS = 94
EXPERTS = 128
POLICIES = 20
MOST = 2000
LAYER_STATISTICS = 4


def hello() -> Hello:
    """As in the policy library: a rule and a condition each, and a set; every other one masks, too."""
    names = tuple(f"policy-{number}" for number in range(POLICIES))
    rules = [rule(name, "stop", action="block", mode="enforce") for name in names]
    masking = names[::2]
    rules += [
        rule(name, "mask", action="mask", mode="audit", conditions=("always",)) for name in masking
    ]
    return Hello(
        engine=0,
        revision="rev-1",
        policies=names,
        rules=tuple(rules),
        sets=tuple(SetFacts(name, "flagged") for name in names),
        masked_experts=dict.fromkeys(masking, EXPERTS // 2),
        blind_layers=0,
        live=True,
    )


def delta(greeting: Hello, random_: random.Random) -> Delta:
    """Anything that can happen, in both modes and phases."""
    numbers = range(len(greeting.rules))
    return Delta(
        0,
        greeting.revision,
        decision_counts=[
            DecisionCount(number, mode, phase, random_.randint(1, 9))
            for number in numbers
            for mode in ("audit", "enforce")
            for phase in ("prompt", "output")
        ],
        outcomes={outcome: random_.randint(1, 9) for outcome in OUTCOMES},
        tokens={"prompt": 100, "output": 100},
        selections=[random_.randint(0, 9) for _ in greeting.sets],
        values=[
            (number, condition, [random_.uniform(-1e6, 1e6)])
            for number in numbers
            for condition in greeting.rules[number].measured()
        ],
        masked_requests=dict.fromkeys(greeting.masked_experts, random_.randint(0, 9)),
        mask_violations=dict.fromkeys(greeting.masked_experts, 1),
        dropped=dict.fromkeys(Stage, 1),
        failures=dict.fromkeys(Stage, 1),
        steps=100,
        host_seconds=dict.fromkeys(HOST_PARTS, 0.1),
    )


def series(registry: CollectorRegistry) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in registry.collect()
        for sample in family.samples
    }


def load(random_: random.Random) -> Load:
    layers = [
        LayerLoad(layer, *(random_.uniform(0, EXPERTS) for _ in range(LAYER_STATISTICS)))
        for layer in range(LAYERS)
    ]
    return Load(0, 1000, tuple(layers))


def test_a_large_model_under_twenty_policies_has_fewer_than_two_thousand_series() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry)
    greeting = hello()
    metrics.greet(greeting)
    random_ = random.Random(0)

    metrics.apply(delta(greeting, random_))
    metrics.show(load(random_))
    metrics.tell(Health(0, False, LAYERS))
    after_one = series(registry)
    for _ in range(200):
        metrics.apply(delta(greeting, random_))
        metrics.show(load(random_))
        metrics.reload(0, succeeded=False)
    after_many = series(registry)

    assert after_one == after_many
    assert LAYERS * LAYER_STATISTICS < len(after_many) < MOST
