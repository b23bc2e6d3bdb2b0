"""The policy language as pydantic models: what may stand where in a YAML document.

They mirror the document key by key, and check all that one mapping can know. What needs more than
one, such as the name of a set, is checked in `references`; what needs a model, in `guard.program`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from guard.policy.conditions import ONE_KEY, Bare, ExpressionSpec
from guard.policy.model import (
    MaskMethod,
    Maturity,
    Mode,
    OnError,
    Phase,
    Severity,
)
from guard.policy.scalars import (
    MAX_PERSIST,
    Count,
    ExpertId,
    ExpertRanges,
    Layer,
    LayerRanges,
    MaskMethodWord,
    MaturityWord,
    ModeWord,
    Name,
    OnErrorWord,
    PhaseWord,
    SetName,
    SetReference,
    SeverityWord,
    UntilValue,
    Weight,
)
from guard.policy.spec import Problem, Spec, word

API_VERSION = "moe-guard/v1"


class MaskSpec(Spec):
    """Experts that a request may not use, or must."""

    experts: SetReference = Field(description="The name of a set in spec.experts.")
    method: MaskMethodWord = Field(
        default=MaskMethod.REROUTE,
        description="reroute (default): out before top-k, the next best comes in. drop: out after "
        "top-k. drop_renorm: the same, and the survivors take over its weight. force: always in.",
    )
    until: UntilValue = Field(
        default="request-end",
        description="request-end (default), clear (the rule turns false) or a number of tokens.",
    )


class BlockSpec(Spec):
    """End the request."""

    message: str = Field(default="", description="What the client and the log are told.")


class ActionSpec(Spec):
    """What a rule does when it fires."""

    model_config = ONE_KEY
    BARE = frozenset({"observe", "block"})

    observe: Bare | None = Field(default=None, description="Count and log; the default.")
    mask: MaskSpec | None = Field(default=None, description="Mask experts for the request.")
    block: BlockSpec | None = Field(default=None, description="End the request.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        return cls.exactly_one(data, cls.key_names(), "an action", "write a rule for each action")


class MatchSpec(Spec):
    """Where a rule applies."""

    LATER = frozenset({"loraAdapters", "labels", "sample"})

    phase: PhaseWord = Field(
        default=Phase.ANY, description="Evaluate at prompt or output positions, or at any."
    )


class PersistSpec(Spec):
    """True when at least `hits` of the rule's last `of` evaluations were."""

    hits: int = Field(ge=1, le=MAX_PERSIST, description="How many evaluations must be true.")
    of: int = Field(ge=1, le=MAX_PERSIST, description="Of how many, the last one included.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        hits, of = data.get("hits"), data.get("of")
        if type(hits) is int and type(of) is int and 1 <= of < hits:
            yield Problem(
                ("hits",), f"{hits} hits cannot happen in {of} evaluations; give at most {of}"
            )


class RuleSpec(Spec):
    """A condition and what follows from it."""

    name: Name = Field(description="Unique in the policy: a-z, 0-9 and '-'.")
    match: MatchSpec = Field(default_factory=MatchSpec, description="Where the rule applies.")
    when: ExpressionSpec = Field(description="The condition.")
    persist: PersistSpec | None = Field(default=None, description="How lasting it must be.")
    then: ActionSpec | None = Field(default=None, description="The action; observe by default.")
    on_error: OnErrorWord | None = Field(
        default=None, description="What a fault of the guard does; the policy's by default."
    )


class EntrySpec(Spec):
    """Some experts of some layers: one of layer and layers, and one of experts and weights."""

    HINTS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("profile", "set"), "a set of a profile is not supported yet; list its experts here"
    )

    layer: Layer | None = Field(default=None, description="The model's own layer number.")
    layers: LayerRanges | None = Field(
        default=None, description="Several: a range such as 20-23, or a list."
    )
    experts: ExpertRanges | None = Field(
        default=None, description="Logical expert ids, and ranges such as 90-95."
    )
    weights: Annotated[dict[ExpertId, Weight], Field(min_length=1)] | None = Field(
        default=None, description="Expert id to weight, for `score`."
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, ["layer", "layers"], "the entry")
        yield from cls.exactly_one(data, ["experts", "weights"], "the entry")


class ModelSpec(Spec):
    """What the served model must match."""

    architecture: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The architecture's name, as in the model's config."
    )
    layers: Count | None = Field(default=None, description="How many MoE layers.")
    experts: Count | None = Field(default=None, description="How many routed experts a layer.")
    top_k: Count | None = Field(default=None, description="How many a token is routed to.")


class MetadataSpec(Spec):
    name: Name = Field(description="Unique in a policy set: a-z, 0-9 and '-'.")
    description: str = Field(default="", description="What the policy is about.")
    severity: SeverityWord = Field(default=Severity.MEDIUM, description="Orders policies.")
    maturity: MaturityWord = Field(default=Maturity.SANDBOX, description="How proven it is.")
    labels: dict[str, str] = Field(default_factory=dict, description="Free labels for people.")


class PolicySpec(Spec):
    LATER = frozenset({"exceptions"})

    mode: ModeWord = Field(default=Mode.AUDIT, description="off, audit (the default) or enforce.")
    on_error: OnErrorWord = Field(
        default=OnError.OPEN, description="What a fault of the guard does to a request."
    )
    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The model's profile, relative to the folder of this file."
    )
    model: ModelSpec | None = Field(default=None, description="The model that this is for.")
    experts: dict[SetName, Annotated[tuple[EntrySpec, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="Named sets of experts."
    )
    rules: tuple[RuleSpec, ...] = Field(description="The rules, in deciding order.")


class PolicyDocument(Spec):
    """A policy: one document of a YAML file."""

    api_version: Annotated[Literal["moe-guard/v1"], BeforeValidator(word([API_VERSION]))] = Field(
        description="The version of the policy language."
    )
    kind: Annotated[Literal["Policy"], BeforeValidator(word(["Policy"], later=["ExpertSets"]))] = Field(
        description="What the document is."
    )
    metadata: MetadataSpec = Field(description="What the policy is called and how it ranks.")
    spec: PolicySpec = Field(description="What the policy does.")
