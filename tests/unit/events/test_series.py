"""However many combinations of labels come, so many are made, and those that are there go on."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from guard.events.message import DecisionCount, Delta, Hello, SetFacts
from guard.events.metrics import GuardMetrics
from guard.events.series import NOTHING, SeriesCap
from tests.unit.events.reports import HELLO, rule

LABELS = ("model_name", "engine", "name")


class Capped:
    def __init__(self, most: int) -> None:
        self.registry = CollectorRegistry()
        dropped = Counter("dropped", "x", LABELS[:2], registry=self.registry)
        self.cap = SeriesCap(most, dropped)
        self.counter = Counter("c", "x", LABELS, registry=self.registry)
        self.gauge = Gauge("g", "x", LABELS, registry=self.registry)
        self.histogram = Histogram("h", "x", LABELS, registry=self.registry)

    def dropped(self, engine: str) -> float:
        labels = {"model_name": "m", "engine": engine}
        return self.registry.get_sample_value("dropped_total", labels) or 0.0

    def value(self, engine: str, name: str) -> float | None:
        labels = {"model_name": "m", "engine": engine, "name": name}
        return self.registry.get_sample_value("c_total", labels)


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("abcdefgh")), max_size=40))
def test_the_first_combinations_of_an_engine_are_made_and_others_counted(
    asked: list[tuple[str, str]],
) -> None:
    capped, most = Capped(4), 4
    expected: dict[str, dict[str, int]] = {"0": {}, "1": {}}
    kept_out: dict[str, set[str]] = {"0": set(), "1": set()}
    out_again: dict[str, int] = {"0": 0, "1": 0}
    for engine, name in asked:
        capped.cap.of(capped.counter, "m", engine, name).inc()
        made = expected[engine]
        if name in made or len(made) < most:
            made[name] = made.get(name, 0) + 1
        elif name not in kept_out[engine]:
            out_again[engine] += 1
            kept_out[engine].add(name)
    for engine in "01":
        assert capped.dropped(engine) == out_again[engine]
        for name in "abcdefgh":
            assert capped.value(engine, name) == expected[engine].get(name)


def test_what_is_kept_out_takes_everything_and_shows_nothing() -> None:
    capped = Capped(0)
    capped.cap.of(capped.gauge, "m", "0", "a").set(1)
    capped.cap.of(capped.histogram, "m", "0", "a").observe(1)
    capped.cap.of(capped.counter, "m", "0", "a").inc(2)

    assert capped.cap.of(capped.counter, "m", "0", "a") is NOTHING
    shown = [sample for family in capped.registry.collect() for sample in family.samples]
    assert {sample.name for sample in shown if not sample.name.endswith("_created")} == {
        "dropped_total"
    }


def test_no_more_are_remembered_than_there_may_be() -> None:
    capped = Capped(3)
    for number in range(100):
        capped.cap.of(capped.counter, "m", "0", str(number))
    assert len(capped.cap._kept_out["0"]) == 3
    assert capped.dropped("0") == 97


def series(registry: CollectorRegistry) -> int:
    """Combinations of labels, a histogram's parts being one."""
    return len(
        {
            (family.name, frozenset(sample.labels.items() - {("le", sample.labels.get("le"))}))
            for family in registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created") and "series_dropped" not in sample.name
        }
    )


def of_names(*names: str) -> Hello:
    """A policy set as after a reload in which everything has another name."""
    return msgspec.structs.replace(
        HELLO,
        revision="-".join(names),
        policies=names,
        rules=tuple(rule("stop", "block", policy=name) for name in names),
        sets=tuple(SetFacts(name, "f") for name in names),
        masked_experts={},
    )


def test_reloads_without_end_neither_raise_nor_pass_the_cap_and_lose_nothing() -> None:
    registry, random_ = CollectorRegistry(), random.Random(0)
    metrics = GuardMetrics("m", registry, most_series=100)
    first = of_names("p-0", "p-1")
    for revision in range(60):
        hello = first if revision == 0 else of_names(f"p-{2 * revision}", f"p-{2 * revision + 1}")
        metrics.greet(hello)
        metrics.apply(
            Delta(
                0,
                hello.revision,
                decision_counts=[DecisionCount(1, "enforce", "output", 1)],
                selections=[random_.randint(1, 9), 0],
                values=[(0, 0, [0.5])],
                steps=1,
            )
        )
    metrics.greet(first)
    metrics.apply(
        Delta(
            0,
            first.revision,
            decision_counts=[DecisionCount(1, "enforce", "output", 1)],
            selections=[0, 0],
        )
    )

    engine = {"model_name": "m", "engine": "0"}
    assert series(registry) == 100
    assert (registry.get_sample_value("moe_guard_series_dropped_total", engine) or 0) > 50
    assert registry.get_sample_value("moe_guard_steps_total", engine) == 60
    labels = engine | {"policy": "p-1", "rule": "stop", "action": "block", "severity": "high"}
    value = registry.get_sample_value(
        "moe_guard_decisions_total", labels | {"mode": "enforce", "phase": "output"}
    )
    assert value == 2, "a series that exists goes on"
    other = GuardMetrics("m", CollectorRegistry(), most_series=0)
    other.greet(HELLO)


def test_each_engine_has_a_cap_of_its_own() -> None:
    registry = CollectorRegistry()
    metrics = GuardMetrics("m", registry, most_series=70)
    for engine in range(2):
        hello = msgspec.structs.replace(
            of_names(*(f"p-{number}" for number in range(40))), engine=engine
        )
        metrics.greet(hello)
    assert series(registry) == 140
