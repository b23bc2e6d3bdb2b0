"""The schema of a rule's `when`: conditions, and how they join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Final

from pydantic import ConfigDict, Field

from guard.policy.model import Comparison, NamedWindow
from guard.policy.scalars import Count, Number, SetReference, WindowValue
from guard.policy.spec import Problem, Spec

ONE_KEY: Final = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})


class Bare(Spec):
    """A word without settings; `{}` or `true`."""


class ThresholdSpec(Spec):
    """A number over a window, compared with exactly one threshold."""

    LATER = frozenset({"budget"})
    HINTS: ClassVar[Mapping[str, str]] = {"bias": "only `score` takes a bias; take it out here"}

    experts: SetReference = Field(description="The name of a set in spec.experts.")
    over: WindowValue = Field(
        default=NamedWindow.REQUEST,
        description="token, a number of tokens, prompt, output or request (the default).",
    )
    min_tokens: Count | None = Field(
        default=None,
        description="Fewer tokens in the window leave the condition unknown. Default: a numeric "
        "window's own size (but 1 for count with above or atLeast), and 1 for named windows.",
    )
    above: Number | None = Field(default=None, description="True when the value is > this.")
    at_least: Number | None = Field(default=None, description="True when the value is >= this.")
    below: Number | None = Field(default=None, description="True when the value is < this.")
    at_most: Number | None = Field(default=None, description="True when the value is <= this.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, [c.value for c in Comparison], "the condition")
        window, floor = data.get("over"), data.get("minTokens")
        size = 1 if window == NamedWindow.TOKEN else window
        if type(size) is int and type(floor) is int and floor > size >= 1:
            text = f"a window of {size} never holds {floor} tokens; give at most {size}"
            yield Problem(("minTokens",), text)

    @property
    def comparison(self) -> tuple[Comparison, float]:
        """The one comparison that is given, with its threshold."""
        given = zip(Comparison, (self.above, self.at_least, self.below, self.at_most), strict=True)
        return next((which, threshold) for which, threshold in given if threshold is not None)


class ScoreSpec(ThresholdSpec):
    """The mean weight of the chosen experts per token, plus a bias."""

    HINTS: ClassVar[Mapping[str, str]] = {}

    bias: Number = Field(default=0.0, description="Added to the mean.")


class ExpressionSpec(Spec):
    """One condition, or conditions joined by all, any or not."""

    model_config = ONE_KEY
    LATER = frozenset(
        {"coactivation", "dormant", "suppressed", "divergence", "entropy", "concentration", "probe"}
    )
    BARE = frozenset({"always"})

    always: Bare | None = Field(default=None, description="True for every request.")
    count: ThresholdSpec | None = Field(
        default=None, description="How often experts of the set were chosen in the window."
    )
    rate: ThresholdSpec | None = Field(
        default=None, description="count by tokens and experts of the set: their mean activation."
    )
    mass: ThresholdSpec | None = Field(
        default=None, description="The share of gate weight that went to the set, 0 to 1."
    )
    score: ScoreSpec | None = Field(
        default=None, description="The weights of the chosen experts of the set, summed per token."
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
