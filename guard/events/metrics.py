"""The guard's Prometheus metrics. Every label has few values by construction: policies, rules, sets,
conditions and fixed words; never a request."""

from __future__ import annotations

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from guard.events.message import Delta, Health, Hello
from guard.events.outcomes import OUTCOMES
from guard.events.rulebook import KEPT_REVISIONS
from guard.failures import Stage

VALUE_BUCKETS = (
    *(0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 10000.0),
)
"""Shares and rates lie in 0..1, counts above 1; scores below 0 fall into the first bucket, because
Prometheus knows no sum for a histogram with negative buckets."""

_ENGINE = ("model_name", "engine")
_RULE = (*_ENGINE, "policy", "rule")
_LATEST: Final = "mostrecent"


class GuardMetrics:
    """Lives in API-server processes only: prometheus_client fixes how values are kept (alone, or
    shared by several servers) when it is first imported there."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"moe_guard_{name}", text, (*_ENGINE, *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(
                f"moe_guard_{name}",
                text,
                (*_ENGINE, *labels),
                registry=registry,
                multiprocess_mode=_LATEST,
            )

        self._up = gauge(
            "up", "1 while the guard is live: it sees every MoE layer and its masks hold; page if 0."
        )
        self._blind_layers = gauge(
            "blind_layers", "MoE layers whose routing the guard does not see as it is."
        )
        self._program_info = gauge(
            "program_info",
            "1 for the policy revision in force, 0 for older ones.",
            "revision",
            "policies",
        )
        self._decisions = counter(
            "decisions_total",
            "Rules that fired. Look the request up in the decision log.",
            "policy",
            "rule",
            "action",
            "mode",
            "severity",
            "phase",
        )
        self._requests = counter(
            "requests_total",
            "Engine requests that ended, by the most that happened to each.",
            "outcome",
        )
        self._tokens = counter("tokens_evaluated_total", "Tokens whose routing was judged.", "phase")
        self._selections = counter(
            "expert_selections_total",
            "Times that an expert of a policy's set was chosen.",
            "policy",
            "set",
        )
        self._values = Histogram(
            "moe_guard_signal_value",
            "A condition's value of each request that ended: the nearest to, or furthest beyond, "
            "its threshold. Much mass close to the threshold asks for a better one.",
            (*_RULE, "condition"),
            buckets=VALUE_BUCKETS,
            registry=registry,
        )
        self._thresholds = gauge(
            "signal_threshold", "The threshold of a condition.", "policy", "rule", "condition"
        )
        self._masked_requests = gauge(
            "masked_requests", "Requests that a mask of the policy holds for now.", "policy"
        )
        self._masked_experts = gauge(
            "masked_experts", "Experts that the policy's masks name.", "policy"
        )
        self._violations = counter(
            "mask_violations_total",
            "Masked experts seen at work in the steps that the running check looks at: page.",
            "policy",
        )
        self._dropped = counter(
            "events_dropped_total",
            "Events lost on their way; what they did was still done.",
            "stage",
        )
        self._failures = counter(
            "failures_total", "Faults of the guard, by stage. Requests followed onError.", "stage"
        )
        self._reloads = counter("reloads_total", "Policy reloads, by result.", "result")
        self._hellos: dict[int, dict[str, Hello]] = {}  # of each engine, the latest last

    def greet(self, hello: Hello) -> None:
        """An engine's guard started, or has new policies: show every series at zero before it moves.

        Series of policies that are gone stay, as counters must; their gauges go to 0.
        """
        known = self._hellos.setdefault(hello.engine, {})
        before = next(reversed(known.values()), None)
        known.pop(hello.revision, None)
        known[hello.revision] = hello
        while len(known) > KEPT_REVISIONS + 1:
            del known[next(iter(known))]
        engine = (self._model, str(hello.engine))
        self._up.labels(*engine).set(1 if hello.live else 0)
        self._blind_layers.labels(*engine).set(hello.blind_layers)
        if before is not None:
            self._program_info.labels(*engine, before.revision, ",".join(before.policies)).set(0)
        self._program_info.labels(*engine, hello.revision, ",".join(hello.policies)).set(1)
        for rule in hello.rules:
            for phase in ("prompt", "output"):
                if rule.phase in (phase, "any"):
                    self._decisions.labels(
                        *engine,
                        rule.policy,
                        rule.rule,
                        rule.action,
                        rule.mode,
                        rule.severity,
                        phase,
                    )
            for number in rule.measured():
                condition, threshold = rule.conditions[number], rule.thresholds[number]
                self._thresholds.labels(*engine, rule.policy, rule.rule, condition).set(threshold)
        masked_before = {} if before is None else before.masked_experts
        for policy in masked_before.keys() - hello.masked_experts.keys():
            self._masked_experts.labels(*engine, policy).set(0)
            self._masked_requests.labels(*engine, policy).set(0)
        for policy, experts in hello.masked_experts.items():
            self._masked_experts.labels(*engine, policy).set(experts)
            if policy not in masked_before:
                self._masked_requests.labels(*engine, policy).set(0)
            self._violations.labels(*engine, policy)
        for named in hello.sets:
            self._selections.labels(*engine, named.policy, named.name)
        for outcome in OUTCOMES:
            self._requests.labels(*engine, outcome)
        for phase in ("prompt", "output"):
            self._tokens.labels(*engine, phase)
        for stage in Stage:
            self._failures.labels(*engine, stage)
            self._dropped.labels(*engine, stage)
        for result in ("success", "failure"):
            self._reloads.labels(*engine, result)

    def tell(self, health: Health) -> None:
        """The state of an engine's guard changed."""
        engine = (self._model, str(health.engine))
        self._up.labels(*engine).set(1 if health.up else 0)
        self._blind_layers.labels(*engine).set(health.blind_layers)

    def apply(self, delta: Delta) -> None:
        """Add what happened. The engine's hello came before."""
        hello = self._hellos[delta.engine][delta.revision]
        engine = (self._model, str(delta.engine))
        for counted in delta.decision_counts:
            rule = hello.rules[counted.rule]
            self._decisions.labels(
                *engine,
                *(rule.policy, rule.rule, rule.action, counted.mode, rule.severity, counted.phase),
            ).inc(counted.count)
        for outcome, count in delta.outcomes.items():
            self._requests.labels(*engine, outcome).inc(count)
        for phase, count in delta.tokens.items():
            self._tokens.labels(*engine, phase).inc(count)
        for named, count in zip(hello.sets, delta.selections, strict=True):
            self._selections.labels(*engine, named.policy, named.name).inc(count)
        for number, condition, values in delta.values:
            rule = hello.rules[number]
            histogram = self._values.labels(*engine, rule.policy, rule.rule, rule.conditions[condition])
            for value in values:
                histogram.observe(value)
        for policy, count in delta.masked_requests.items():
            self._masked_requests.labels(*engine, policy).set(count)
        for policy, count in delta.mask_violations.items():
            self._violations.labels(*engine, policy).inc(count)
        for stage, count in delta.dropped.items():
            self._dropped.labels(*engine, stage).inc(count)
        for stage, count in delta.failures.items():
            self._failures.labels(*engine, stage).inc(count)

    def reload(self, engine: int, *, succeeded: bool) -> None:
        """A new policy set came into force, or was refused."""
        result = "success" if succeeded else "failure"
        self._reloads.labels(self._model, str(engine), result).inc()

    def drop(self, engine: int, stage: Stage, count: int = 1) -> None:
        self._dropped.labels(self._model, str(engine), stage).inc(count)

    def fail(self, engine: int, stage: Stage) -> None:
        self._failures.labels(self._model, str(engine), stage).inc()
