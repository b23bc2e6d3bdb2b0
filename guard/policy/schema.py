"""The policy language as pydantic models: what may stand where in a YAML document.

They mirror the document key by key, and check all that one mapping can know. What needs more than
one, such as the name of a set, is checked in `references`; what needs a model, in `guard.program`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

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
    Day,
    ExpertId,
    ExpertRanges,
    Labels,
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
    Share,
    Texts,
    UntilValue,
    Weight,
)
from guard.policy.spec import Problem, Spec, word

API_VERSION = "moe-guard/v1"

POLICY = "Policy"
EXPERT_SETS = "ExpertSets"
POLICY_TEST = "PolicyTest"
"""A test suite beside policies: not of the policy set, and passed over when one is loaded."""

KINDS = (POLICY, EXPERT_SETS, POLICY_TEST)


class MaskSpec(Spec):
    """Experts that a request may not use, or must."""

    HINTS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("for", "duration", "ttl"),
            "how long a mask holds is `until`: request-end, clear or a number of tokens",
        ),
        "set": "the set is called `experts`",
    }

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

    HINTS: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("reason", "msg"), "the text is called `message`"
    )

    message: str = Field(default="", description="What the client and the log are told.")


class ActionSpec(Spec):
    """What a rule does when it fires."""

    model_config = ONE_KEY
    BARE = frozenset({"observe", "block"})
    HINTS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("deny", "reject", "stop"), "a request is ended with `block: {message: TEXT}`"),
        **dict.fromkeys(("audit", "warn", "log"), "to count and log is `observe`"),
        "action": "write the action itself: observe, mask: {experts: SET} or block: {message: TEXT}",
    }

    observe: Bare | None = Field(default=None, description="Count and log; the default.")
    mask: MaskSpec | None = Field(default=None, description="Mask experts for the request.")
    block: BlockSpec | None = Field(default=None, description="End the request.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        return cls.exactly_one(data, cls.key_names(), "an action", "write a rule for each action")


class RequestMatchSpec(Spec):
    """Which requests are meant."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "tenant": "a tenant is a label: labels: {tenant: NAME}",
        "label": "several may be given: labels: {NAME: VALUE}",
        "loraAdapter": "several may be given: loraAdapters: [NAME]",
    }

    lora_adapters: Texts | None = Field(
        default=None, description="The request uses one of these LoRA adapters."
    )
    labels: Labels | None = Field(
        default=None,
        description="The request has each of these labels, with the value or one of the values. "
        "Labels come from configured headers or API keys.",
    )


class MatchSpec(RequestMatchSpec):
    """Where a rule applies."""

    phase: PhaseWord = Field(
        default=Phase.ANY, description="Evaluate at prompt or output positions, or at any."
    )
    sample: Share = Field(
        default=1.0, description="Apply the rule to this share of requests only, above 0 and up to 1."
    )


class ExceptionMatchSpec(RequestMatchSpec):
    """Which requests an exception is for."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})
    HINTS: ClassVar[Mapping[str, str]] = {
        **RequestMatchSpec.HINTS,
        "phase": "an exception is for whole requests; leave `phase` out",
        "sample": "an exception is for named requests; put `sample` into the rule's match",
    }

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        if not data:
            text = (
                "an exception for every request would switch the rules off; name labels or "
                "loraAdapters, or set the policy's mode"
            )
            yield Problem((), text)


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

    HINTS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("condition", "expr", "if"), "a rule's condition is called `when`"),
        **dict.fromkeys(
            ("action", "deny", "effect", "do"),
            "what a rule does is called `then`: observe, mask: {experts: SET} or "
            "block: {message: TEXT}",
        ),
        **dict.fromkeys(("alert", "rule", "id"), "a rule's name is called `name`"),
        "for": "how long it must be true is `persist: {hits: m, of: n}`, in evaluations",
        "severity": "the severity is the policy's: metadata.severity",
        "mode": "the mode is the policy's: spec.mode; put the rule into a policy of its own",
        "labels": "which requests it is for is `match: {labels: {NAME: VALUE}}`",
    }

    name: Name = Field(description="Unique in the policy: a-z, 0-9 and '-'.")
    match: MatchSpec = Field(default_factory=MatchSpec, description="Where the rule applies.")
    when: ExpressionSpec = Field(description="The condition.")
    persist: PersistSpec | None = Field(default=None, description="How lasting it must be.")
    then: ActionSpec | None = Field(default=None, description="The action; observe by default.")
    on_error: OnErrorWord | None = Field(
        default=None, description="What a fault of the guard does; the policy's by default."
    )


class ExceptionSpec(Spec):
    """Requests for which rules are evaluated and logged, but do not act."""

    HINTS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("expires", "expiry", "validUntil"), "its last day is called `until`, such as 2027-03-31"
        ),
        "labels": "which requests it is for is `match: {labels: {NAME: VALUE}}`",
    }

    name: Name = Field(description="Unique in the policy: a-z, 0-9 and '-'.")
    match: ExceptionMatchSpec = Field(description="For which requests.")
    rules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        default=None, description="For which rules of this policy; all by default."
    )
    until: Day | None = Field(
        default=None, description="The last day on which it applies, in UTC, such as 2027-03-31."
    )


class ListedEntrySpec(Spec):
    """Some experts of some layers: one of layer and layers, and one of experts and weights."""

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


class EntrySpec(ListedEntrySpec):
    """Some experts of some layers, or a set of a profile."""

    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="The profile that holds `set`, relative to the folder of this file; that of "
        "spec.profile by default.",
    )
    set: SetName | None = Field(default=None, description="The name of a set in a profile.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        if "set" not in data and "profile" not in data:
            yield from super().problems(data)
            return
        for key in ("layer", "layers", "experts", "weights"):
            if key in data:
                text = f"an entry that takes a set of a profile has no {key!r}; write a second entry"
                yield Problem((key,), text, at_key=True)
        if "set" not in data:
            yield Problem((), "which set of the profile? Name it: {profile: PATH, set: NAME}")


ExpertSetsSpec = dict[SetName, Annotated[tuple[EntrySpec, ...], Field(min_length=1)]]


class ModelSpec(Spec):
    """What the served model must match."""

    architecture: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The architecture's name, as in the model's config."
    )
    layers: Count | None = Field(default=None, description="How many MoE layers.")
    experts: Count | None = Field(default=None, description="How many routed experts a layer.")
    top_k: Count | None = Field(default=None, description="How many a token is routed to.")


class MetadataSpec(Spec):
    HINTS: ClassVar[Mapping[str, str]] = {
        "annotations": "free words for people are `labels: {NAME: VALUE}`"
    }

    name: Name = Field(description="Unique in a policy set: a-z, 0-9 and '-'.")
    description: str = Field(default="", description="What the policy is about.")
    severity: SeverityWord = Field(default=Severity.MEDIUM, description="Orders policies.")
    maturity: MaturityWord = Field(default=Maturity.SANDBOX, description="How proven it is.")
    labels: dict[str, str] = Field(default_factory=dict, description="Free labels for people.")


class PolicySpec(Spec):
    HINTS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("validationFailureAction", "enforcementAction", "enforce"),
            "whether it acts is `mode`: off, audit or enforce",
        ),
        **dict.fromkeys(
            ("failurePolicy", "failMode"), "what a fault does is `onError`: open or closed"
        ),
        "sets": "the sets stand under `experts`",
        **dict.fromkeys(("name", "severity", "description", "maturity"), "it stands under `metadata`"),
    }

    mode: ModeWord = Field(default=Mode.AUDIT, description="off, audit (the default) or enforce.")
    on_error: OnErrorWord = Field(
        default=OnError.OPEN, description="What a fault of the guard does to a request."
    )
    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The model's profile, relative to the folder of this file."
    )
    model: ModelSpec | None = Field(default=None, description="The model that this is for.")
    experts: ExpertSetsSpec = Field(default_factory=dict, description="Named sets of experts.")
    rules: tuple[RuleSpec, ...] = Field(description="The rules, in deciding order.")
    exceptions: tuple[ExceptionSpec, ...] = Field(
        default=(), description="Requests for which rules do not act."
    )


class ExpertSetsMetadataSpec(Spec):
    name: Name | None = Field(default=None, description="For people: sets are named by their file.")
    description: str = Field(default="", description="Where the sets come from.")
    labels: dict[str, str] = Field(default_factory=dict, description="Free labels for people.")


class ExpertSetsBodySpec(Spec):
    HINTS: ClassVar[Mapping[str, str]] = {"sets": "the sets stand under `experts`, as in a policy"}

    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Holds the sets that entries name without a profile of their own."
    )
    experts: Annotated[ExpertSetsSpec, Field(min_length=1)] = Field(
        description="Sets of experts, that policies name as file-name/set."
    )


_ApiVersion = Annotated[Literal["moe-guard/v1"], BeforeValidator(word([API_VERSION]))]


class PolicyDocument(Spec):
    """A policy: one document of a YAML file."""

    api_version: _ApiVersion = Field(description="The version of the policy language.")
    kind: Annotated[Literal["Policy"], BeforeValidator(word(KINDS))] = Field(
        description="What the document is."
    )
    metadata: MetadataSpec = Field(description="What the policy is called and how it ranks.")
    spec: PolicySpec = Field(description="What the policy does.")


class ExpertSetsDocument(Spec):
    """Sets of experts for several policies: one document of a YAML file."""

    api_version: _ApiVersion = Field(description="The version of the policy language.")
    kind: Literal["ExpertSets"] = Field(description="What the document is.")
    metadata: ExpertSetsMetadataSpec | None = Field(default=None, description="For people.")
    spec: ExpertSetsBodySpec = Field(description="The sets.")
