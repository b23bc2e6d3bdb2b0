"""The schema of a rule's `when`: conditions, and how they join.

A *measure* says which number is meant, over which window; a condition is a measure with a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Final

from pydantic import ConfigDict, Field

from guard.policy.model import Comparison, NamedWindow, Reduce
from guard.policy.scalars import (
    Budget,
    Count,
    Number,
    PositiveNumber,
    ReduceWord,
    SetName,
    SetReference,
    WindowValue,
)
from guard.policy.spec import Problem, Spec

ONE_KEY: Final = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

BUDGET: Final = "budget"


class Bare(Spec):
    """A word without settings; `{}` or `true`."""


class MeasureSpec(Spec):
    """A number over a window."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "bias": "only `score` takes a bias; take it out here",
        "threshold": "say how to compare with it: above, atLeast, below or atMost",
        "window": "the window is called `over`",
        "for": "a condition has no `for`; write `persist: {hits: m, of: n}` in the rule",
        "set": "the set is called `experts`",
        **dict.fromkeys(("greaterThan", "gt", "min"), "write `above` (>) or `atLeast` (>=)"),
        **dict.fromkeys(("lessThan", "lt", "max"), "write `below` (<) or `atMost` (<=)"),
    }

    over: WindowValue = Field(
        default=NamedWindow.REQUEST,
        description="token, a number of tokens, prompt, output or request (the default).",
    )
    min_tokens: Count | None = Field(
        default=None,
        description="Fewer tokens in the window leave the condition unknown. Default: a numeric "
        "window's own size (but 1 for count, coactivation and dormant with above or atLeast), and 1 "
        "for named windows.",
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        window, floor = data.get("over"), data.get("minTokens")
        size = 1 if window == NamedWindow.TOKEN else window
        if type(size) is int and type(floor) is int and floor > size >= 1:
            text = f"a window of {size} never holds {floor} tokens; give at most {size}"
            yield Problem(("minTokens",), text)


class SetMeasureSpec(MeasureSpec):
    experts: SetReference = Field(
        description="The name of a set in spec.experts, or file-name/set for one of ExpertSets."
    )


class ScoreMeasureSpec(SetMeasureSpec):
    HINTS: ClassVar[Mapping[str, str]] = {
        key: hint for key, hint in MeasureSpec.HINTS.items() if key != "bias"
    }

    bias: Number = Field(default=0.0, description="Added to the mean.")


class CoactivationMeasureSpec(SetMeasureSpec):
    members: Count | None = Field(
        default=None, description="A token counts if at least so many experts of the set were chosen."
    )
    layers: Count | None = Field(
        default=None,
        description="A token counts if experts of the set were chosen in at least so many layers.",
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from super().problems(data)
        yield from cls.exactly_one(data, ["members", "layers"], "coactivation")


class DormantMeasureSpec(MeasureSpec):
    baseline_below: PositiveNumber = Field(
        description="Experts whose baseline rate in the profile is below this count as dormant."
    )
    experts: SetReference | None = Field(
        default=None, description="Only experts of this set; all of the profile by default."
    )


class DivergenceMeasureSpec(MeasureSpec):
    reduce: ReduceWord = Field(
        default=Reduce.MAX, description="max (default) or mean over the model's MoE layers."
    )


class ProbeMeasureSpec(MeasureSpec):
    name: SetName | None = Field(
        default=None, description="The probe's name in the profile; needed where it has several."
    )


class ComparedSpec(Spec):
    """Exactly one threshold."""

    above: Number | None = Field(default=None, description="True when the value is > this.")
    at_least: Number | None = Field(default=None, description="True when the value is >= this.")
    below: Number | None = Field(default=None, description="True when the value is < this.")
    at_most: Number | None = Field(default=None, description="True when the value is <= this.")
    budget: Budget | None = Field(
        default=None,
        description="Take the threshold that the profile has for this false-positive rate.",
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from super().problems(data)
        yield from cls.exactly_one(data, [*(c.value for c in Comparison), BUDGET], "the condition")

    @property
    def comparison(self) -> tuple[Comparison, float] | None:
        """The comparison that is given, with its threshold; None where a budget is."""
        given = zip(Comparison, (self.above, self.at_least, self.below, self.at_most), strict=True)
        return next(((which, value) for which, value in given if value is not None), None)


class SetConditionSpec(ComparedSpec, SetMeasureSpec):
    """A number of a set of experts over a window, compared with a threshold."""


class ScoreConditionSpec(ComparedSpec, ScoreMeasureSpec):
    """The mean weight of the chosen experts per token, plus a bias."""


class CoactivationConditionSpec(ComparedSpec, CoactivationMeasureSpec):
    """How many tokens used enough of the set at once."""


class DormantConditionSpec(ComparedSpec, DormantMeasureSpec):
    """How often experts were chosen that benign traffic hardly uses."""


class DivergenceConditionSpec(ComparedSpec, DivergenceMeasureSpec):
    """How far the use of experts is from the profile's."""


class DistributionConditionSpec(ComparedSpec, MeasureSpec):
    """How evenly experts are used."""


class ProbeConditionSpec(ComparedSpec, ProbeMeasureSpec):
    """A linear probe of the profile, as a probability."""


ConditionSpec = (
    SetConditionSpec
    | ScoreConditionSpec
    | CoactivationConditionSpec
    | DormantConditionSpec
    | DivergenceConditionSpec
    | DistributionConditionSpec
    | ProbeConditionSpec
)


class ExpressionSpec(Spec):
    """One condition, or conditions joined by all, any or not."""

    model_config = ONE_KEY
    BARE = frozenset({"always"})
    HINTS: ClassVar[Mapping[str, str]] = {
        "and": "conditions are joined with `all`",
        "or": "conditions are joined with `any`",
    }

    always: Bare | None = Field(default=None, description="True for every request.")
    count: SetConditionSpec | None = Field(
        default=None, description="How often experts of the set were chosen in the window."
    )
    rate: SetConditionSpec | None = Field(
        default=None, description="count by tokens and experts of the set: their mean activation."
    )
    mass: SetConditionSpec | None = Field(
        default=None, description="The share of gate weight that went to the set, 0 to 1."
    )
    score: ScoreConditionSpec | None = Field(
        default=None, description="The weights of the chosen experts of the set, summed per token."
    )
    coactivation: CoactivationConditionSpec | None = Field(
        default=None,
        description="Tokens in which members of the set, or members in several layers, were chosen "
        "together.",
    )
    dormant: DormantConditionSpec | None = Field(
        default=None,
        description="Selections of experts whose baseline rate in the profile is below a limit.",
    )
    suppressed: SetConditionSpec | None = Field(
        default=None,
        description="ln(baseline rate / rate): the set is used less than it should be.",
    )
    divergence: DivergenceConditionSpec | None = Field(
        default=None,
        description="Jensen-Shannon divergence of the window's use of experts from the profile's, in "
        "nats, 0 to 0.693.",
    )
    entropy: DistributionConditionSpec | None = Field(
        default=None, description="Effective number of experts used, 1/Σp², mean over layers."
    )
    concentration: DistributionConditionSpec | None = Field(
        default=None,
        description="The largest share of a layer's selections that one expert got, times E/k, mean "
        "over layers.",
    )
    probe: ProbeConditionSpec | None = Field(
        default=None, description="A linear probe of the profile, as a probability."
    )
    all_: Annotated[tuple[ExpressionSpec, ...], Field(min_length=1)] | None = Field(
        default=None, alias="all", description="True when every child is."
    )
    any_: Annotated[tuple[ExpressionSpec, ...], Field(min_length=1)] | None = Field(
        default=None, alias="any", description="True when a child is."
    )
    not_: ExpressionSpec | None = Field(
        default=None, alias="not", description="True when the child is false."
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        return cls.exactly_one(data, cls.key_names(), "a condition", "join several with all or any")


class ExpressionMeasureSpec(Spec):
    """Of a profile's threshold: which number it is for."""

    model_config = ONE_KEY

    count: SetMeasureSpec | None = None
    rate: SetMeasureSpec | None = None
    mass: SetMeasureSpec | None = None
    score: ScoreMeasureSpec | None = None
    coactivation: CoactivationMeasureSpec | None = None
    dormant: DormantMeasureSpec | None = None
    suppressed: SetMeasureSpec | None = None
    divergence: DivergenceMeasureSpec | None = None
    entropy: MeasureSpec | None = None
    concentration: MeasureSpec | None = None
    probe: ProbeMeasureSpec | None = None

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        return cls.exactly_one(data, cls.key_names(), "a threshold")
