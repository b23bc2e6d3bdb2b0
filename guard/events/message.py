"""What travels from the engine core to the API server, in msgpack: a hello, then what happened."""

from __future__ import annotations

import msgspec

from guard.program.program import ProgramRule

HOST_PARTS = ("begin", "end", "report", "ledger")
"""Of the guard's host time in a step: three in the worker, then the engine core's own."""


class RuleFacts(msgspec.Struct, frozen=True):
    """A rule as the event plane needs it; its number in `Hello.rules` is its deciding order."""

    policy: str
    rule: str
    mode: str
    severity: str
    action: str
    phase: str
    reason: str
    message: str
    on_error: str
    conditions: tuple[str, ...]
    thresholds: tuple[float, ...]

    @staticmethod
    def of(rule: ProgramRule) -> RuleFacts:
        return RuleFacts(
            policy=rule.policy,
            rule=rule.rule,
            mode=str(rule.mode),
            severity=str(rule.severity),
            action=rule.action.name.lower(),
            phase=str(rule.phase),
            reason=rule.reason,
            message=rule.message,
            on_error=str(rule.on_error),
            conditions=rule.condition_labels,
            thresholds=rule.thresholds,
        )

    def measured(self) -> tuple[int, ...]:
        """Numbers of the conditions that measure something; `always` does not."""
        return tuple(
            number
            for number, label in enumerate(self.conditions)
            if label.partition("#")[0] != "always"
        )


class SetFacts(msgspec.Struct, frozen=True):
    policy: str
    name: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """An engine that has proved its guard; said again when another policy set came into force.

    masked_experts: by policy, how many experts its mask rules name
    blind_layers: MoE layers that do not report; the guard is live where there are none
    """

    engine: int
    revision: str
    policies: tuple[str, ...]
    rules: tuple[RuleFacts, ...]
    sets: tuple[SetFacts, ...]
    masked_experts: dict[str, int]
    blind_layers: int
    live: bool


class EvidenceFacts(msgspec.Struct, frozen=True):
    """value is None where the condition was unknown when its rule fired."""

    condition: str
    value: float | None
    threshold: float


class Decision(msgspec.Struct, frozen=True):
    """A rule that fired: one line of the decision log.

    time: RFC 3339, UTC
    mode: what was in effect for this request
    outcome: what was done: observed, masked or blocked
    """

    decision_id: str
    time: str
    revision: str
    policy: str
    rule: str
    mode: str
    action: str
    severity: str
    request_id: str
    phase: str
    position: int
    evidence: tuple[EvidenceFacts, ...]
    unseen_tokens: int
    outcome: str
    exempt: bool = False
    model: str = ""


class DecisionCount(msgspec.Struct, frozen=True):
    rule: int
    mode: str
    phase: str
    count: int


class Delta(msgspec.Struct, tag="delta"):
    """What happened since the last delta, decided by one revision.

    revision: whose rules and sets the numbers are; the hello that has them came before
    decisions: those that were kept; `decision_counts` counts all
    outcomes: requests that ended, by outcome
    tokens: evaluated tokens, by phase
    selections: by number of the set in `Hello.sets`
    values: by (rule, number of its condition), one value for each request that ended
    masked_requests: by policy, requests under one of its masks now
    mask_violations: by policy, how often the running check saw an expert at work that it masks
    dropped, failures: by stage
    steps: that were judged, or should have been
    host_seconds: of the guard's in steps, by part, one of `HOST_PARTS`
    """

    engine: int
    revision: str = ""
    decisions: list[Decision] = []
    decision_counts: list[DecisionCount] = []
    outcomes: dict[str, int] = {}
    tokens: dict[str, int] = {}
    selections: list[int] = []
    values: list[tuple[int, int, list[float]]] = []
    masked_requests: dict[str, int] = {}
    mask_violations: dict[str, int] = {}
    dropped: dict[str, int] = {}
    failures: dict[str, int] = {}
    steps: int = 0
    host_seconds: dict[str, float] = {}


class News(msgspec.Struct, frozen=True, tag="news"):
    """Decisions of a delta, for API servers behind the first: to be shown, not to be counted again."""

    engine: int
    decisions: list[Decision]


class Health(msgspec.Struct, frozen=True, tag="health"):
    """The guard's state changed since its hello. up: it is live and not blind."""

    engine: int
    up: bool
    blind_layers: int


class LayerLoad(msgspec.Struct, frozen=True):
    """How the experts of a layer were used; see `guard.events.load`.

    layer: the model's own number
    divergence_nats: None where no profile has a baseline of the layer
    """

    layer: int
    effective_experts: float
    entropy_nats: float
    max_share: float
    divergence_nats: float | None = None


class Load(msgspec.Struct, frozen=True, tag="load"):
    """How experts were used since the last one, in sampled steps.

    tokens: rows that were counted
    layers: those that some row chose an expert of
    """

    engine: int
    tokens: int
    layers: tuple[LayerLoad, ...]


Message = Hello | Delta | News | Health | Load

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)
_SERIAL_BYTES = 8


def encode(message: Message, serial: int = 0) -> bytes:
    """serial: 1, 2, 3 … of what one engine sends to one API server; 0: not numbered"""
    return serial.to_bytes(_SERIAL_BYTES, "big") + _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Raises msgspec.DecodeError for anything but a message of this version."""
    message: Message = _decoder.decode(memoryview(data)[_SERIAL_BYTES:])
    return message


def serial_of(data: bytes) -> int:
    return int.from_bytes(data[:_SERIAL_BYTES], "big")
