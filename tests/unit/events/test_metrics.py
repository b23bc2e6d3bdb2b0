"""What Prometheus sees, to the letter. A change of the golden text is a change of the contract."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from guard.events.message import DecisionCount, Delta, Health, LayerLoad, Load, RuleFacts
from guard.events.metrics import GuardMetrics
from guard.failures import Stage
from guard.overrides.model import OPERATOR
from tests.unit.events.reports import HELLO, decision, rule

GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"

# As in the policy language's contract, `model_name` and `engine` left out.
LABELS = {
    "moe_guard_up": set(),
    "moe_guard_blind_layers": set(),
    "moe_guard_program_info": {"revision", "policies"},
    "moe_guard_decisions": {"policy", "rule", "action", "mode", "severity", "phase"},
    "moe_guard_requests": {"outcome"},
    "moe_guard_tokens_evaluated": {"phase"},
    "moe_guard_expert_selections": {"policy", "set"},
    "moe_guard_signal_value": {"policy", "rule", "condition"},
    "moe_guard_signal_threshold": {"policy", "rule", "condition"},
    "moe_guard_masked_requests": {"policy"},
    "moe_guard_masked_experts": {"policy"},
    "moe_guard_mask_violations": {"policy"},
    "moe_guard_events_dropped": {"stage"},
    "moe_guard_failures": {"stage"},
    "moe_guard_reloads": {"result"},
    "moe_guard_operator_masks": set(),
    "moe_guard_layer_effective_experts": {"layer"},
    "moe_guard_layer_entropy_nats": {"layer"},
    "moe_guard_layer_max_share": {"layer"},
    "moe_guard_layer_divergence_nats": {"layer"},
    "moe_guard_load_tokens": set(),
    "moe_guard_steps": set(),
    "moe_guard_host_seconds": {"part"},
    "moe_guard_log_bytes": set(),
    "moe_guard_webhooks": {"result"},
    "moe_guard_event_subscribers": set(),
    "moe_guard_series_dropped": set(),
}

DELTA = Delta(
    0,
    "rev-1",
    decisions=[decision("cmpl-secret")],
    decision_counts=[
        DecisionCount(2, "enforce", "output", 3),
        DecisionCount(0, "audit", "prompt", 1),
    ],
    outcomes={"passed": 4, "blocked": 1},
    tokens={"prompt": 100, "output": 20},
    selections=[17, 0],
    values=[(2, 0, [0.02, 0.5]), (1, 0, [-3.0, 1e6])],
    masked_requests={"p": 2},
    dropped={"event_buffer": 5},
    failures={"evaluate": 1},
    steps=3,
    host_seconds={"begin": 0.25, "ledger": 0.5},
)
LOAD = Load(0, 40, (LayerLoad(3, 6.5, 1.75, 0.25, 0.125), LayerLoad(10, 8.0, 2.0, 0.125)))


def moved() -> tuple[GuardMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry)
    metrics.greet(HELLO)
    metrics.apply(DELTA)
    metrics.show(LOAD)
    return metrics, registry


def exposition(registry: CollectorRegistry) -> str:
    lines = generate_latest(registry).decode().splitlines()
    return "\n".join(line for line in lines if "_created" not in line) + "\n"


def test_the_exposition_is_the_golden_one() -> None:
    assert exposition(moved()[1]) == GOLDEN.read_text(encoding="utf-8")


def test_the_labels_are_those_of_the_contract() -> None:
    shown = {
        family.name: {
            frozenset(sample.labels) - {"le"}
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for family in moved()[1].collect()
    }

    expected = {name: {frozenset({"model_name", "engine"} | own)} for name, own in LABELS.items()}
    assert shown == expected


def test_no_request_is_named() -> None:
    assert "cmpl" not in exposition(moved()[1])


def test_an_engine_that_greets_is_shown_at_zero_before_anything_happens() -> None:
    registry = CollectorRegistry()
    GuardMetrics("m", registry).greet(HELLO)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})

    assert value("moe_guard_up") == 1
    assert value("moe_guard_requests_total", outcome="blocked") == 0
    assert value("moe_guard_mask_violations_total", policy="p") == 0
    for stage in Stage:
        assert value("moe_guard_failures_total", stage=stage) == 0
    stop = {"policy": "p", "rule": "stop", "action": "block", "mode": "enforce", "severity": "high"}
    assert value("moe_guard_decisions_total", **stop, phase="output") == 0
    assert value("moe_guard_decisions_total", **stop, phase="prompt") is None


def test_another_revision_puts_the_old_one_to_zero() -> None:
    metrics, registry = moved()
    newer = type(HELLO)(
        **{name: getattr(HELLO, name) for name in HELLO.__struct_fields__ if name != "revision"},
        revision="rev-2",
    )
    metrics.greet(newer)
    metrics.greet(newer)

    def shown(revision: str) -> float | None:
        labels = {"model_name": "m", "engine": "0", "revision": revision, "policies": "p,q"}
        return registry.get_sample_value("moe_guard_program_info", labels)

    assert (shown("rev-1"), shown("rev-2")) == (0, 1)


def test_a_change_of_health_and_violations_show_on_the_engine_they_are_of() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry)
    metrics.greet(HELLO)
    metrics.tell(Health(0, False, 2))
    metrics.apply(Delta(0, revision="rev-1", selections=[0, 0], mask_violations={"p": 3}))
    engine = {"model_name": "m", "engine": "0"}
    assert registry.get_sample_value("moe_guard_up", engine) == 0
    assert registry.get_sample_value("moe_guard_blind_layers", engine) == 2
    labels = engine | {"policy": "p"}
    assert registry.get_sample_value("moe_guard_mask_violations_total", labels) == 3
    metrics.tell(Health(0, True, 0))
    assert registry.get_sample_value("moe_guard_up", engine) == 1


def test_a_threshold_that_is_gone_is_no_number() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry)
    metrics.greet(HELLO)
    kept, *gone = HELLO.rules
    metrics.greet(msgspec.structs.replace(HELLO, revision="rev-2", rules=(kept,)))

    def threshold(rule: RuleFacts) -> float | None:
        named = {"policy": rule.policy, "rule": rule.rule, "condition": rule.conditions[0]}
        labels = {"model_name": "m", "engine": "0", **named}
        return registry.get_sample_value("moe_guard_signal_threshold", labels)

    assert threshold(kept) == 0.25
    assert [str(threshold(rule)) for rule in gone] == ["nan"] * len(gone)


def test_the_use_of_experts_is_shown_as_of_the_last_message_and_its_tokens_add_up() -> None:
    metrics, registry = moved()
    metrics.show(Load(0, 2, (LayerLoad(3, 1.0, 0.0, 1.0),)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})

    assert value("moe_guard_load_tokens_total") == 42
    assert value("moe_guard_layer_effective_experts", layer="3") == 1
    assert value("moe_guard_layer_effective_experts", layer="10") == 8
    assert value("moe_guard_layer_divergence_nats", layer="10") is None
    assert math.isnan(value("moe_guard_layer_divergence_nats", layer="3") or 0.0), "it had a baseline"


def test_an_operators_masks_are_counted_as_of_the_last_hello() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry)
    masks = tuple(rule(f"mask-{number}", "mask", policy=OPERATOR) for number in (1, 2))
    engine = {"model_name": "m", "engine": "0"}
    shown = []
    for rules in (HELLO.rules, (*HELLO.rules, *masks), HELLO.rules):
        metrics.greet(msgspec.structs.replace(HELLO, rules=rules))
        shown.append(registry.get_sample_value("moe_guard_operator_masks", engine))
    assert shown == [0, 2, 0]


def test_an_engine_that_starts_again_goes_on_from_where_the_one_before_was() -> None:
    metrics, registry = moved()
    metrics.greet(HELLO)  # its own counts begin at 0
    metrics.apply(DELTA)
    metrics.show(LOAD)
    engine = {"model_name": "m", "engine": "0"}
    assert registry.get_sample_value("moe_guard_steps_total", engine) == 6
    assert registry.get_sample_value("moe_guard_load_tokens_total", engine) == 80
    begin = engine | {"part": "begin"}
    assert registry.get_sample_value("moe_guard_host_seconds_total", begin) == 0.5
