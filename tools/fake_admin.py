"""The admin API of a server without an engine: real routes and bus, made-up routing and decisions."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import numpy as np
import uvicorn
from fastapi import FastAPI
from guard_vllm.admin import context as admin
from guard_vllm.admin.context import AdminContext
from guard_vllm.admin.endpoint import AdminEndpoint
from guard_vllm.admin.keys import AdminKeys
from guard_vllm.labels import ApiKeyLabels
from guard_vllm.settings import Settings
from prometheus_client import CollectorRegistry

from guard.events.bus import EventBus
from guard.events.load import ExpertCounts, LayerCounts, encode_counts, layer_load
from guard.events.message import Decision, Delta, EvidenceFacts, Health, Hello, RuleFacts, encode
from guard.events.metrics import GuardMetrics
from guard.overrides.model import Overrides
from guard.overrides.store import OverrideStore

KEY: Final = "demo-key"
VIEWER_KEY: Final = "viewer-key"
LAYERS, EXPERTS, TOP_K = 48, 128, 8
ATTACKED: Final = {12: (85, 90, 91), 20: (7,), 31: (60, 61, 62, 63)}
_START_S: Final = 20.0


def _rule(
    policy: str, rule: str, mode: str, severity: str, action: str, conditions: dict[str, float]
) -> RuleFacts:
    return RuleFacts(
        policy=policy,
        rule=rule,
        mode=mode,
        severity=severity,
        action=action,
        phase="output",
        reason=f"moe_guard:{policy}/{rule}",
        message="",
        on_error="open",
        conditions=tuple(conditions),
        thresholds=tuple(conditions.values()),
    )


RULES: Final = (
    _rule("restricted-chemistry", "stop", "enforce", "critical", "block", {"mass": 0.3}),
    _rule("restricted-chemistry", "burst", "enforce", "critical", "mask", {"rate": 0.12}),
    _rule("safety-suppressed", "drop", "audit", "high", "observe", {"suppressed": 1.4}),
    _rule("routing-drift", "watch", "audit", "low", "observe", {"divergence": 0.2, "entropy": 31.0}),
)


class FakeServer:
    """base_url: where it listens"""

    def __init__(self, folder: Path, port: int) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.registry = CollectorRegistry()
        self.bus = EventBus(GuardMetrics("demo/model", self.registry), "demo/model")
        self.store = OverrideStore(folder)
        self.says_experts = True
        self._random = np.random.default_rng(7)
        self._counts_LE = np.zeros((LAYERS, EXPERTS), np.int64)
        self._usual_LE = self._random.dirichlet(np.full(EXPERTS, 3.0), LAYERS)
        self._tokens = self._decided = 0
        names = tuple(dict.fromkeys(rule.policy for rule in RULES))
        hello = Hello(0, "9f2c4e7a1b", names, RULES, (), {"restricted-chemistry": 7}, 0, True)
        self.bus.receive(encode(hello))
        people = {KEY: ("alice", "admin"), VIEWER_KEY: ("bob", "viewer")}
        keys = AdminKeys(
            ApiKeyLabels(
                {
                    hashlib.sha256(key.encode()).digest(): {"name": name, "role": role}
                    for key, (name, role) in people.items()
                }
            )
        )
        settings = Settings(policies="policies", state_dir=str(folder))
        nobody = cast(Any, self)
        self.context = AdminContext(settings, self.bus, self.store, nobody, nobody, keys)

    def ask(self, method: str) -> list[bytes]:
        """In the place of the engine cores."""
        layers = [
            LayerCounts(layer, counts.tolist(), layer_load(layer, counts))
            for layer, counts in enumerate(self._counts_LE)
        ]
        return [encode_counts(ExpertCounts(self._tokens, 16, layers if self.says_experts else []))]

    def route(self, tokens: int, *, attack: bool = False) -> None:
        """Tokens pass through the model; under attack a few experts take much of them."""
        shares_LE = self._usual_LE.copy()
        if attack:
            for layer, experts in ATTACKED.items():
                shares_LE[layer] *= 0.45
                shares_LE[layer, list(experts)] += 0.55 / len(experts)
        for mask in self.store.read().masks:
            for layer, expert in mask.experts:
                shares_LE[layer, expert] = 0
        shares_LE /= shares_LE.sum(axis=1, keepdims=True)
        for layer in range(LAYERS):
            self._counts_LE[layer] += self._random.multinomial(tokens * TOP_K, shares_LE[layer])
        self._tokens += tokens

    def decide(self, rule: RuleFacts = RULES[0], *, value: float = 0.41, times: int = 1) -> None:
        """The rule fires."""
        decisions = []
        for _ in range(times):
            self._decided += 1
            number = hashlib.sha256(str(self._decided).encode()).hexdigest()
            outcome = {"block": "blocked", "mask": "masked"}.get(rule.action, "observed")
            decisions.append(
                Decision(
                    decision_id=number[:16],
                    time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    revision="9f2c4e7a1b",
                    policy=rule.policy,
                    rule=rule.rule,
                    mode=rule.mode,
                    action=rule.action,
                    severity=rule.severity,
                    request_id=f"chatcmpl-{number[16:28]}",
                    phase=rule.phase,
                    position=211,
                    evidence=tuple(
                        EvidenceFacts(condition, value * threshold / 0.3, threshold)
                        for condition, threshold in zip(rule.conditions, rule.thresholds, strict=True)
                    ),
                    unseen_tokens=0,
                    outcome=outcome if rule.mode == "enforce" else "observed",
                )
            )
        self.bus.receive(encode(Delta(0, "9f2c4e7a1b", decisions=decisions)))

    def mask(self, *experts: tuple[int, int], reason: str) -> None:
        """As an operator would, without an engine to have it in."""
        overrides, _ = self.store.read().with_mask(experts, by="alice", reason=reason, lasts=None)
        self.store.write(overrides)

    def unmask(self) -> None:
        self.store.write(msgspec.structs.replace(self.store.read(), masks=Overrides().masks))

    def go_down(self) -> None:
        self.bus.receive(encode(Health(0, False, 2)))


@contextmanager
def fake_server(folder: Path) -> Iterator[FakeServer]:
    """Listens until the block ends. folder: for what operators change"""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        fake = FakeServer(folder, listening.getsockname()[1])
        before = list(admin._contexts)
        admin._contexts[:] = [fake.context]
        app = FastAPI()
        AdminEndpoint().attach_router(app)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + _START_S
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.02)
            yield fake
        finally:
            server.force_exit = server.should_exit = True
            thread.join(_START_S)
            admin._contexts[:] = before
