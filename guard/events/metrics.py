"""The guard's Prometheus metrics. Every label has few values by construction: policies, rules, sets,
conditions and fixed words; never a request."""

from __future__ import annotations

import math
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from guard.events.message import HOST_PARTS, Delta, Health, Hello, Load
from guard.events.outcomes import OUTCOMES
from guard.events.rulebook import KEPT_REVISIONS
from guard.events.series import MOST_SERIES, SeriesCap
from guard.failures import Stage
from guard.overrides.model import OPERATOR

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
WEBHOOK_RESULTS: Final = ("success", "failure", "dropped")


class GuardMetrics:
    """Lives in API-server processes only: prometheus_client fixes how values are kept (alone, or
    shared by several servers) when it is first imported there.

    most_series: combinations of labels that it makes for an engine; others are left out and counted
    """

    def __init__(
        self,
        model_name: str,
        registry: CollectorRegistry = REGISTRY,
        most_series: int = MOST_SERIES,
    ) -> None:
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
        self._operator_masks = gauge("operator_masks", "Masks that an operator put in force by hand.")
        self._layer_loads = {
            "effective_experts": gauge(
                "layer_effective_experts",
                "Among how many experts of a layer the work is shared, 1/sum of squared shares; of "
                "sampled steps, as those below.",
                "layer",
            ),
            "entropy_nats": gauge(
                "layer_entropy_nats", "Entropy of a layer's use of its experts, in nats.", "layer"
            ),
            "max_share": gauge(
                "layer_max_share",
                "What the busiest expert of a layer takes of its selections.",
                "layer",
            ),
            "divergence_nats": gauge(
                "layer_divergence_nats",
                "Jensen-Shannon divergence of a layer's use of experts from the profile's baseline.",
                "layer",
            ),
        }
        self._load_tokens = counter(
            "load_tokens_total", "Tokens that the figures of layers are made of."
        )
        self._steps = counter("steps_total", "Engine steps that the guard saw.")
        self._host_seconds = counter(
            "host_seconds_total", "Host time that the guard took in steps, by part.", "part"
        )
        self._log_bytes = counter("log_bytes_total", "Bytes that the decision log got.")
        self._webhooks = counter(
            "webhooks_total",
            "Notifications that were delivered or given up, and decisions that found too many waiting.",
            "result",
        )
        self._subscribers = Gauge(
            "moe_guard_event_subscribers",
            "Clients that read the stream of events now.",
            _ENGINE,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._series_dropped = counter(
            "series_dropped_total",
            "Label combinations that were left out of these metrics: there were too many.",
        )
        self._of = SeriesCap(most_series, self._series_dropped).of
        self._shown: set[tuple[int, int, str]] = set()  # figures of (engine, layer)
        self._hellos: dict[int, dict[str, Hello]] = {}  # of each engine, the latest last

    def greet(self, hello: Hello) -> None:
        """An engine's guard started, or has new policies: show every series at zero before it moves.

        Series of policies that are gone stay, as counters must; their gauges go to 0, and their
        thresholds, for which 0 would be a value, to NaN.
        """
        known = self._hellos.setdefault(hello.engine, {})
        before = next(reversed(known.values()), None)
        known.pop(hello.revision, None)
        known[hello.revision] = hello
        while len(known) > KEPT_REVISIONS + 1:
            del known[next(iter(known))]
        engine = (self._model, str(hello.engine))
        self._of(self._up, *engine).set(1 if hello.live else 0)
        self._of(self._blind_layers, *engine).set(hello.blind_layers)
        self._show_at_zero(engine)
        masks = sum(rule.policy == OPERATOR for rule in hello.rules)
        self._of(self._operator_masks, *engine).set(masks)
        if before is not None:
            self._of(self._program_info, *engine, before.revision, ",".join(before.policies)).set(0)
        self._of(self._program_info, *engine, hello.revision, ",".join(hello.policies)).set(1)
        for rule in hello.rules:
            for phase in ("prompt", "output"):
                if rule.phase in (phase, "any"):
                    self._of(
                        self._decisions,
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
                self._of(self._thresholds, *engine, rule.policy, rule.rule, condition).set(threshold)
        for gone in _measured(before) - _measured(hello):
            self._of(self._thresholds, *engine, *gone).set(math.nan)
        masked_before = {} if before is None else before.masked_experts
        for policy in masked_before.keys() - hello.masked_experts.keys():
            self._of(self._masked_experts, *engine, policy).set(0)
            self._of(self._masked_requests, *engine, policy).set(0)
        for policy, experts in hello.masked_experts.items():
            self._of(self._masked_experts, *engine, policy).set(experts)
            if policy not in masked_before:
                self._of(self._masked_requests, *engine, policy).set(0)
            self._of(self._violations, *engine, policy)
        for named in hello.sets:
            self._of(self._selections, *engine, named.policy, named.name)

    def _show_at_zero(self, engine: tuple[str, str]) -> None:
        """What every engine has, whatever its policies: ahead of what may come to be too much."""
        self._series_dropped.labels(*engine)
        for outcome in OUTCOMES:
            self._of(self._requests, *engine, outcome)
        for phase in ("prompt", "output"):
            self._of(self._tokens, *engine, phase)
        for stage in Stage:
            self._of(self._failures, *engine, stage)
            self._of(self._dropped, *engine, stage)
        for result in ("success", "failure"):
            self._of(self._reloads, *engine, result)
        self._of(self._log_bytes, *engine)
        for result in WEBHOOK_RESULTS:
            self._of(self._webhooks, *engine, result)
        self._of(self._subscribers, *engine)
        for part in HOST_PARTS:
            self._of(self._host_seconds, *engine, part)
        self._of(self._steps, *engine)
        self._of(self._load_tokens, *engine)

    def tell(self, health: Health) -> None:
        """The state of an engine's guard changed."""
        engine = (self._model, str(health.engine))
        self._of(self._up, *engine).set(1 if health.up else 0)
        self._of(self._blind_layers, *engine).set(health.blind_layers)

    def show(self, load: Load) -> None:
        """How an engine's experts were used. A layer that was not used keeps what it shows; one whose
        baseline is gone shows that there is no divergence to tell."""
        engine = (self._model, str(load.engine))
        self._of(self._load_tokens, *engine).inc(load.tokens)
        for layer in load.layers:
            for name, metric in self._layer_loads.items():
                key, value = (load.engine, layer.layer, name), getattr(layer, name)
                if value is not None:
                    self._shown.add(key)
                elif key not in self._shown:
                    continue
                self._of(metric, *engine, str(layer.layer)).set(math.nan if value is None else value)

    def apply(self, delta: Delta) -> None:
        """Add what happened. The engine's hello came before."""
        hello = self._hellos[delta.engine][delta.revision]
        engine = (self._model, str(delta.engine))
        for counted in delta.decision_counts:
            rule = hello.rules[counted.rule]
            self._of(
                self._decisions,
                *engine,
                *(rule.policy, rule.rule, rule.action, counted.mode, rule.severity, counted.phase),
            ).inc(counted.count)
        for outcome, count in delta.outcomes.items():
            self._of(self._requests, *engine, outcome).inc(count)
        for phase, count in delta.tokens.items():
            self._of(self._tokens, *engine, phase).inc(count)
        for named, count in zip(hello.sets, delta.selections, strict=True):
            self._of(self._selections, *engine, named.policy, named.name).inc(count)
        for number, condition, values in delta.values:
            rule = hello.rules[number]
            histogram = self._of(
                self._values, *engine, rule.policy, rule.rule, rule.conditions[condition]
            )
            for value in values:
                histogram.observe(value)
        for policy, count in delta.masked_requests.items():
            self._of(self._masked_requests, *engine, policy).set(count)
        for policy, count in delta.mask_violations.items():
            self._of(self._violations, *engine, policy).inc(count)
        for stage, count in delta.dropped.items():
            self._of(self._dropped, *engine, stage).inc(count)
        for stage, count in delta.failures.items():
            self._of(self._failures, *engine, stage).inc(count)
        self._of(self._steps, *engine).inc(delta.steps)
        for part, seconds in delta.host_seconds.items():
            self._of(self._host_seconds, *engine, part).inc(seconds)

    def reload(self, engine: int, *, succeeded: bool) -> None:
        """A new policy set came into force, or was refused."""
        result = "success" if succeeded else "failure"
        self._of(self._reloads, self._model, str(engine), result).inc()

    def drop(self, engine: int, stage: Stage, count: int = 1) -> None:
        self._of(self._dropped, self._model, str(engine), stage).inc(count)

    def log_bytes(self, engine: int, count: int) -> None:
        self._of(self._log_bytes, self._model, str(engine)).inc(count)

    def webhook(self, engine: int, result: str, count: int = 1) -> None:
        """result: one of WEBHOOK_RESULTS"""
        self._of(self._webhooks, self._model, str(engine), result).inc(count)

    def subscribers(self, engine: int, count: int) -> None:
        self._of(self._subscribers, self._model, str(engine)).set(count)

    def fail(self, engine: int, stage: Stage) -> None:
        self._of(self._failures, self._model, str(engine), stage).inc()


def _measured(hello: Hello | None) -> set[tuple[str, str, str]]:
    """Policy, rule and condition of each threshold."""
    rules = () if hello is None else hello.rules
    return {(rule.policy, rule.rule, rule.conditions[n]) for rule in rules for n in rule.measured()}
