"""What a busy guarded server exposes: GuardMetrics driven by messages, and vLLM's own beside it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from guard.events.message import (
    HOST_PARTS,
    DecisionCount,
    Delta,
    Health,
    Hello,
    LayerLoad,
    Load,
    RuleFacts,
    SetFacts,
)
from guard.events.metrics import WEBHOOK_RESULTS, GuardMetrics
from guard.failures import Stage
from guard.overrides.model import OPERATOR

MODEL = "demo/model"
_ENGINE = {"model_name": MODEL, "engine": "0"}
_LAYERS = (0, 1, 9, 10, 11)


def rule(
    policy: str,
    name: str,
    *,
    action: str = "observe",
    mode: str = "audit",
    severity: str = "high",
    conditions: tuple[str, ...] = ("rate",),
) -> RuleFacts:
    reason = f"moe_guard:{policy}/{name}"
    thresholds = (0.25,) * len(conditions)
    return RuleFacts(
        policy, name, mode, severity, action, "any", reason, "", "open", conditions, thresholds
    )


HELLO = Hello(
    engine=0,
    revision="rev-1",
    policies=("chemistry", "drift", "steer"),
    rules=(
        rule("chemistry", "stop", action="block", mode="enforce", severity="critical"),
        rule("steer", "away", action="mask", mode="enforce", conditions=("always",)),
        rule("drift", "watch", severity="low", conditions=("divergence", "entropy")),
        rule(OPERATOR, "mask-1", action="mask", mode="enforce", conditions=("always",)),
    ),
    sets=(SetFacts("chemistry", "flagged"), SetFacts("steer", "odd"), SetFacts(OPERATOR, "mask-1")),
    masked_experts={"steer": 3, OPERATOR: 1},
    blind_layers=0,
    live=True,
)

# Of rule 0 some were held back by an exception, which counts as audit.
DELTA = Delta(
    0,
    "rev-1",
    decision_counts=[
        DecisionCount(0, "enforce", "output", 2),
        DecisionCount(0, "audit", "output", 1),
        DecisionCount(1, "enforce", "prompt", 1),
        DecisionCount(2, "audit", "output", 4),
    ],
    outcomes={"passed": 20, "observed": 4, "unjudged": 1, "masked": 1, "blocked": 2},
    tokens={"prompt": 900, "output": 600},
    selections=[40, 7, 3],
    values=[(0, 0, [0.02, 0.2, 0.6]), (2, 0, [0.1, 0.3]), (2, 1, [20.0, 31.0])],
    masked_requests={"steer": 2},
    mask_violations={"steer": 0},
    steps=50,
    host_seconds=dict.fromkeys(HOST_PARTS, 0.002),
    dropped={"event_buffer": 1},
    failures={"evaluate": 1},
)

LOAD = Load(0, 800, tuple(LayerLoad(layer, 50.0, 3.9, 0.04, 0.05) for layer in _LAYERS))


class BusyServer:
    """A registry that moves on by one delta at each `step`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._guard = GuardMetrics(MODEL, registry)
        self._guard.greet(HELLO)
        self._guard.tell(Health(0, True, 0))
        self._vllm = VllmMetrics(registry)
        self.step()

    def step(self) -> None:
        self._guard.apply(DELTA)
        self._guard.show(LOAD)
        self._guard.reload(0, succeeded=True)
        self._guard.drop(0, Stage.DELIVER)
        self._guard.log_bytes(0, 4096)
        for result in WEBHOOK_RESULTS:
            self._guard.webhook(0, result)
        self._guard.subscribers(0, 2)
        self._vllm.step()


class VllmMetrics:
    """Those of vLLM's that the rules and dashboards use, by its names and labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = tuple(_ENGINE)

        def counter(name: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", "As vLLM has it.", (*labels, *more), registry=registry)

        self._tokens = [counter("prompt_tokens"), counter("generation_tokens")]
        self._finished = counter("request_success", "finished_reason")
        self._levels = [
            Gauge(f"vllm:{name}", "As vLLM has it.", labels, registry=registry)
            for name in ("num_requests_running", "num_requests_waiting")
        ]
        self._seconds = [
            Histogram(
                f"vllm:{name}", "As vLLM has it.", labels, registry=registry, buckets=(0.01, 0.1, 1, 10)
            )
            for name in (
                "time_to_first_token_seconds",
                "inter_token_latency_seconds",
                "e2e_request_latency_seconds",
            )
        ]

    def step(self) -> None:
        for tokens in self._tokens:
            tokens.labels(**_ENGINE).inc(500)
        for reason in ("stop", "length", "abort"):
            self._finished.labels(**_ENGINE, finished_reason=reason).inc(3)
        for level in self._levels:
            level.labels(**_ENGINE).set(4)
        for seconds in self._seconds:
            seconds.labels(**_ENGINE).observe(0.05)
