"""What `/guard/v1` takes and gives, for FastAPI's checks and its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Reason = Annotated[str, Field(min_length=1, max_length=500, description="Why, for the audit log.")]
Expert = Annotated[
    str,
    Field(
        max_length=32, pattern=r"^L\d{1,5}/E\d{1,6}(-\d{1,6})?$", description="L12/E85 or L12/E90-95"
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MaskBody(_Body):
    """Experts to take out of use, for all requests, for those with labels, or for one."""

    experts: Annotated[list[Expert], Field(min_length=1, max_length=1024)]
    reason: Reason
    duration: Annotated[str, Field(max_length=20, description="2h, 90m; none: until lifted")] | None = (
        None
    )
    method: Literal["reroute", "drop", "drop_renorm"] = "reroute"
    labels: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=256)]] = Field(
        default_factory=dict, max_length=32
    )
    request: Annotated[str, Field(max_length=256)] = ""


class ReasonBody(_Body):
    reason: Reason


class ModeBody(ReasonBody):
    mode: Literal["off", "audit", "enforce"] | None = Field(
        description="None: the one that the policy file has."
    )


class KillSwitchBody(ReasonBody):
    on: bool = Field(description="True: everything only observes.")


class Mask(BaseModel):
    id: str
    experts: list[str]
    by: str
    reason: str
    created: str
    until: str | None
    method: str
    labels: dict[str, str]
    request: str


class Changed(BaseModel):
    """What is in force now, in every rank of every engine."""

    revision: str
    mask: Mask | None = None


class Engine(BaseModel):
    engine: int
    revision: str
    live: bool
    blind_layers: int


class Status(BaseModel):
    up: bool
    revision: str
    policies: list[str]
    engines: list[Engine]
    kill_switch: bool
    modes: dict[str, str]
    masks: list[Mask]


class Rule(BaseModel):
    rule: str
    action: str
    phase: str
    conditions: list[str]
    thresholds: list[float]


class Policy(BaseModel):
    policy: str
    mode: str
    severity: str
    rules: list[Rule]


class Policies(BaseModel):
    revision: str
    policies: list[Policy]


class Events(BaseModel):
    events: list[dict[str, Any]]


class LayerExperts(BaseModel):
    """counts: by logical expert id. The rest is null where nothing was counted, or no profile has a
    baseline."""

    layer: int
    counts: list[int]
    effective_experts: float | None = None
    entropy_nats: float | None = None
    max_share: float | None = None
    divergence_nats: float | None = None


class Experts(BaseModel):
    """sampled_every: steps; 0: nothing is counted"""

    tokens: int
    sampled_every: int
    layers: list[LayerExperts]


class Problem(BaseModel):
    """As vLLM's own errors read."""

    error: dict[str, Any]
