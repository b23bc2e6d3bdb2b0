"""A test suite as pydantic models: what may stand where in a document of `kind: PolicyTest`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Final, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainValidator

from guard.policy.scalars import (
    MAX_LAYER,
    MAX_TOKENS,
    Count,
    Day,
    ExpertId,
    ExpertRanges,
    LabelName,
    Layer,
    Name,
    PhaseWord,
    Share,
    Text,
)
from guard.policy.schema import API_VERSION, POLICY_TEST
from guard.policy.spec import Problem, Spec, value_fault, word
from guard.policy.suggest import describe, did_you_mean

OUTCOMES: Final = ("passed", "observed", "unjudged", "masked", "blocked")
MAX_SEGMENT_TOKENS: Final = 65_536
MAX_CASE_TOKENS: Final = 262_144
MAX_GATE_WEIGHT: Final = 1e6
BASELINE: Final = "baseline"
QUIET: Final = "quiet"

_RANGE = re.compile(r"([0-9]{1,4})(?: *- *([0-9]{1,4}))?")
_OFFSET = re.compile(r"output(?: *\+ *(?P<offset>[0-9]{1,9}))?")


class Position(NamedTuple):
    """A position of a request: `number`, counted from the first output token where `in_output`."""

    number: int
    in_output: bool = False

    def resolve(self, num_prompt_tokens: int) -> int:
        return self.number + (num_prompt_tokens if self.in_output else 0)


def _position(value: object) -> Position:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS:
        return Position(value)
    if isinstance(value, str) and (match := _OFFSET.fullmatch(value)):
        return Position(int(match["offset"] or 0), in_output=True)
    raise value_fault(
        "expected a position, counted from 0, such as 37, or output+5 for the sixth output token, "
        f"found {describe(value)}"
    )


def _positions(value: object) -> tuple[Position, ...]:
    if isinstance(value, tuple) and value:
        return tuple(_position(one) for one in value)
    return (_position(value),)


def _until(value: object) -> Position | Literal["end"]:
    return "end" if value == "end" else _position(value)


def _use(value: object) -> object:
    return {"set": value} if isinstance(value, str) else value


def _expect(value: object) -> object:
    if value == "nothing":
        return ()
    if isinstance(value, str):
        found = describe(value) + did_you_mean(value, ["nothing"])
        raise value_fault(f"expected nothing, or a list of what must happen, found {found}")
    return (value,) if isinstance(value, dict) else value


def _threshold(value: object) -> object:
    return {"rule": value} if isinstance(value, str) else value


def _model(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _paths(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _layers(value: object) -> tuple[int, ...]:
    """A number is how many; a range or a list is which."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_LAYER:
        return tuple(range(value))
    numbers: set[int] = set()
    for item in value if isinstance(value, tuple) and value else (value,):
        match = _RANGE.fullmatch(str(item)) if isinstance(item, str | int) else None
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_LAYER or (isinstance(value, int)):
            raise value_fault(
                "expected how many MoE layers there are, or their numbers such as 3-26 or [1, 3], "
                f"found {describe(item)}"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


PositionValue = Annotated[Position, PlainValidator(_position)]
RuleReference = Annotated[str, Field(min_length=1)]
GateWeight = Annotated[float, Field(ge=0, le=MAX_GATE_WEIGHT, allow_inf_nan=False)]


class RequestSpec(Spec):
    """What is known of the request when it comes."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "loraAdapters": "a request uses one adapter: loraAdapter: NAME",
        "label": "labels: {NAME: VALUE}",
        "enforced": "the policies in audit that the request enforces: enforce: [NAME]",
    }

    id: Text | None = Field(
        default=None, description="The engine's id: it decides who is in a `sample`."
    )
    labels: dict[LabelName, Text] = Field(
        default_factory=dict, description="The labels that the request has."
    )
    lora_adapter: Text | None = Field(default=None, description="The LoRA adapter that it uses.")
    enforce: tuple[Name, ...] = Field(
        default=(), description="Policies in audit that the request asks to have enforced."
    )
    date: Day | None = Field(
        default=None, description="The day on which it came, in UTC; today by default."
    )


class UseSpec(Spec):
    """Which experts are meant: a set, or those that a rule's condition reads."""

    set: Text | None = Field(default=None, description="A set of a policy or of its profile.")
    policy: Name | None = Field(
        default=None, description="Whose set, where several policies have different ones of that name."
    )
    rule: RuleReference | None = Field(
        default=None, description="The rule whose condition reads them, or policy/rule."
    )
    condition: Text | None = Field(
        default=None, description="The condition, such as rate or rate#2, where the rule has several."
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, ["set", "rule"], "what the tokens use")
        for key, goes_with in (("policy", "set"), ("condition", "rule")):
            if key in data and goes_with not in data:
                yield Problem((key,), f"{key!r} goes with {goes_with!r}", at_key=True)

    @property
    def is_baseline(self) -> bool:
        return self.set == BASELINE and self.policy is None

    @property
    def is_quiet(self) -> bool:
        return self.set == QUIET and self.policy is None


class SegmentSpec(Spec):
    """Some tokens in a row, and which experts they are routed to."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "count": "how many selections of the set in the whole segment: selections: N",
        "set": "the set's name stands under `use`",
        "layers": "layer to experts: experts: {12: [85, 90]}",
    }

    tokens: Annotated[int, Field(ge=1, le=MAX_SEGMENT_TOKENS)] = Field(description="How many tokens.")
    use: Annotated[UseSpec, BeforeValidator(_use)] | None = Field(
        default=None,
        description="A set of experts, of a policy or its profile, that the tokens use; {rule: NAME} "
        "for those that a rule reads; baseline: follow the profile's rates; quiet (the default): "
        "experts that no rule reads.",
    )
    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="The mean activation rate of the set's experts over the segment, met exactly; by "
        "default as high as top-k allows.",
    )
    selections: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How often experts of the set are chosen in the segment, instead."
    )
    mass: Share | None = Field(
        default=None,
        description="The set's share of the gate weight in its layers, above 0 and up to 1.",
    )
    experts: Annotated[dict[Layer, ExpertRanges], Field(min_length=1)] | None = Field(
        default=None,
        description="Layer to the experts that every token uses there: {12: [85, 90]}.",
    )
    weights: Annotated[dict[Layer, dict[ExpertId, GateWeight]], Field(min_length=1)] | None = Field(
        default=None,
        description="The same with their gate weights: {12: {85: 0.75, 90: 0.25}}.",
    )
    rest: Annotated[Literal["quiet", "baseline"], BeforeValidator(word([QUIET, BASELINE]))] = Field(
        default="quiet",
        description="What fills the rest of top-k: experts that no rule reads, or the profile's rates.",
    )
    seen: bool = Field(default=True, description="false: the guard could not see these tokens.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        listed = [key for key in ("experts", "weights") if key in data]
        for key in listed if "use" in data else ():
            text = f"the segment has `use`; take {key!r} out, or write two segments"
            yield Problem((key,), text, at_key=True)
        has_set = "use" in data and data["use"] not in (BASELINE, QUIET)
        ways = [key for key in ("rate", "selections", "mass") if key in data]
        if ways and not has_set:
            text = f"{ways[0]!r} is of a set's experts; name the set: use: NAME"
            yield Problem((ways[0],), text, at_key=True)
        elif len(ways) > 1:
            text = f"{ways[0]!r} says it already; take {ways[1]!r} out"
            yield Problem((ways[1],), text, at_key=True)
        if "rest" in data and not has_set and not listed:
            yield Problem(("rest",), "`rest` goes with a set or with experts", at_key=True)


class MaskExpectation(Spec):
    """Positions at which a rule's mask is in force."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "to": "the first position that is free again: until",
        "at": "the first position that is masked: from",
    }

    rule: RuleReference = Field(description="The rule that masks.")
    from_: PositionValue | None = Field(
        default=None, alias="from", description="First masked position."
    )
    until: Annotated[Position | Literal["end"] | None, PlainValidator(_until)] = Field(
        default=None, description="First position that is free again; end: it holds to the end."
    )


class Expectation(Spec):
    """One thing that must happen."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "decision": "name the rule that fires: {rule: NAME, at: POSITION}",
        "position": "the position at which the rule fires: at",
        "until": "of a mask: {mask: {rule: NAME, from: POSITION, until: POSITION}}",
        "block": "{outcome: blocked, by: RULE}",
        "blocked": "{outcome: blocked, by: RULE}",
        "count": "how often the rule fires: times",
    }

    rule: RuleReference | None = Field(default=None, description="A rule that fires, or policy/rule.")
    at: Annotated[tuple[Position, ...] | None, PlainValidator(_positions)] = Field(
        default=None, description="Where: a position or a list of them."
    )
    from_: PositionValue | None = Field(
        default=None, alias="from", description="Not before this position."
    )
    to: PositionValue | None = Field(default=None, description="Not behind this position.")
    phase: PhaseWord | None = Field(default=None, description="In the prompt or in the output.")
    times: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="How often; once by default, and 0 is never."
    )
    exempt: bool | None = Field(
        default=None, description="true: an exception withholds the rule's action for this request."
    )
    outcome: Annotated[str, BeforeValidator(word(OUTCOMES))] | None = Field(
        default=None, description="What becomes of the request."
    )
    by: RuleReference | None = Field(
        default=None, description="Of outcome: blocked, the rule that stops it."
    )
    mask: MaskExpectation | None = Field(default=None, description="Where a mask is in force.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        kinds = ["rule", "outcome", "mask"]
        yield from cls.exactly_one(data, kinds, "an expectation", "write an item for each")
        if "rule" not in data and ("outcome" in data or "mask" in data):
            for key in ("at", "from", "to", "phase", "times", "exempt"):
                if key in data:
                    inside = "mask" in data and key == "from"
                    where = "inside `mask`" if inside else "to an item with `rule`"
                    yield Problem((key,), f"{key!r} belongs {where}", at_key=True)
        if "at" in data:
            for key in ("from", "to", "phase", "times"):
                if key in data:
                    yield Problem((key,), f"`at` says it already; take {key!r} out", at_key=True)
        if "by" in data and data.get("outcome") != "blocked":
            yield Problem(("by",), "`by` names the rule of outcome: blocked", at_key=True)


class ThresholdSpec(Spec):
    """Cases at, just below and just above a rule's threshold, made by the command."""

    rule: RuleReference = Field(description="The rule, or policy/rule.")
    condition: Text | None = Field(
        default=None, description="The condition, where the rule has several: rate, or rate#2."
    )


class CaseSpec(Spec):
    """A request, its routing, and what must happen."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "labels": "labels stand under `request`",
        "enforce": "the policies stand under `request`",
        "tokens": "tokens stand in the segments of `prompt` and `output`",
        "trace": "the tokens stand under `prompt` and `output`",
    }

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="What the case shows; unique in the suite."
    )
    request: RequestSpec = Field(
        default_factory=RequestSpec, description="What is known of the request."
    )
    prompt: Annotated[tuple[SegmentSpec, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="The prompt's tokens, segment after segment; one quiet token by default.",
    )
    output: tuple[SegmentSpec, ...] = Field(
        default=(), description="The output's tokens that are fed back."
    )
    expect: Annotated[tuple[Expectation, ...], BeforeValidator(_expect)] | None = Field(
        default=None, description="nothing, or what must happen. A decision that is not listed fails."
    )
    also: Annotated[Literal["allowed"], BeforeValidator(word(["allowed"]))] | None = Field(
        default=None, description="allowed: decisions that are not listed may happen too."
    )
    threshold: Annotated[ThresholdSpec, BeforeValidator(_threshold)] | None = Field(
        default=None, description="Make three cases of it: at this rule's threshold, below and above."
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        if "threshold" in data:
            for key in ("prompt", "output", "expect", "also"):
                if key in data:
                    text = f"the command makes the tokens and knows what must happen; take {key!r} out"
                    yield Problem((key,), text, at_key=True)
        elif "expect" not in data and all(key in cls.key_names() for key in data):
            yield Problem((), "what must happen? Write expect: nothing, or a list, or threshold: RULE")


class ModelSpec(Spec):
    """The model's shape, or where it is."""

    path: Text | None = Field(
        default=None, description="The model's folder, or its config.json, relative to this file."
    )
    architecture: Text | None = Field(default=None, description="As in the model's config.")
    layers: Annotated[tuple[int, ...] | None, PlainValidator(_layers)] = Field(
        default=None, description="How many MoE layers, or their numbers."
    )
    experts: Count | None = Field(default=None, description="How many routed experts a layer.")
    top_k: Count | None = Field(default=None, description="How many a token is routed to.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        shape = ("layers", "experts", "topK")
        if "path" in data:
            for key in (*shape, "architecture"):
                if key in data:
                    yield Problem((key,), f"the model's folder says it; take {key!r} out", at_key=True)
        elif all(key in cls.key_names() for key in data):
            for key in shape:
                if key not in data:
                    yield Problem((), f"the key {key!r} is missing")
        experts, top_k = data.get("experts"), data.get("topK")
        if type(experts) is int and type(top_k) is int and top_k > experts:
            yield Problem(("topK",), f"a layer of {experts} experts cannot choose {top_k}")


class SuiteMetadataSpec(Spec):
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="What the suite is called in reports; its file by default."
    )
    description: str = Field(default="", description="For people.")


class SuiteDocument(Spec):
    """A test suite: one document of a YAML file."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "spec": "a suite's keys stand at the top: policies, model, cases",
        "tests": "the tests stand under `cases`",
        "profile": "the profile is the policies'; for its shape leave `model` out",
    }

    api_version: Annotated[Literal["moe-guard/v1"], BeforeValidator(word([API_VERSION]))] = Field(
        description="The version of the policy language."
    )
    kind: Annotated[Literal["PolicyTest"], BeforeValidator(word([POLICY_TEST]))] = Field(
        description="What the document is."
    )
    metadata: SuiteMetadataSpec = Field(
        default_factory=SuiteMetadataSpec, description="For people and reports."
    )
    policies: Annotated[tuple[Text, ...], BeforeValidator(_paths), Field(min_length=1)] | None = Field(
        default=None,
        description="Policy files or folders, relative to this file; its own folder by default.",
    )
    model: Annotated[ModelSpec, BeforeValidator(_model)] | None = Field(
        default=None,
        description="The model's shape, or a path to its folder; by default that of the policies' "
        "profile, or of their spec.model.",
    )
    cases: Annotated[tuple[CaseSpec, ...], Field(min_length=1)] = Field(description="The tests.")
