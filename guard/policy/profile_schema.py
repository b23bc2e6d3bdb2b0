"""The schema of a profile: what is known of one model's experts, as JSON.

    {
      "apiVersion": "moe-guard/v1",
      "kind": "Profile",
      "model": {"architecture": "Qwen3MoeForCausalLM", "layers": 48, "experts": 128, "topK": 8},
      "sets": {"chemistry": [{"layer": 12, "experts": [85, "90-95"]},
                             {"layer": 13, "weights": {"4": 0.8, "7": -0.2}}]},
      "baselines": {"tokens": 120000, "rates": {"0": [0.061, 0.064], "1": [0.058, 0.07]}},
      "probes": {"harmful": {"bias": -2.1, "weights": [{"layer": 12, "weights": {"85": 0.4}}]}},
      "thresholds": [{"phase": "output",
                      "when": {"rate": {"experts": "chemistry", "over": 64, "minTokens": 16}},
                      "budgets": [{"budget": 0.01, "above": 0.12}]}],
      "neverMask": [{"layer": 12, "experts": [3], "reason": "super expert"}],
      "protective": {"refusals": {}},
      "statistics": {"chemistry": {...}}, "causal": {"chemistry": {...}},
      "data": {"prompts.moetrace": "(its SHA-256)"}, "licence": "CC0-1.0"
    }

Layers and experts are the model's own numbers; JSON writes numbers that are keys as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from guard.policy.conditions import ExpressionMeasureSpec
from guard.policy.model import Comparison, Phase
from guard.policy.profile_evidence import CausalCheckSpec, SetStatisticsSpec
from guard.policy.scalars import (
    Budget,
    Count,
    ExpertId,
    ExpertRanges,
    Fingerprint,
    Layer,
    LayerRanges,
    Number,
    PhaseWord,
    SetName,
    Weight,
)
from guard.policy.schema import API_VERSION, ListedEntrySpec
from guard.policy.spec import Problem, Spec, word

PROFILE = "Profile"


def _number_key(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


LayerKey = Annotated[Layer, BeforeValidator(_number_key)]
ExpertKey = Annotated[ExpertId, BeforeValidator(_number_key)]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ProfileModelSpec(Spec):
    """The model that was profiled."""

    architecture: Annotated[str, Field(min_length=1)] = Field(description="As in its config.json.")
    layers: Count | None = Field(default=None, description="How many MoE layers.")
    experts: Count | None = Field(default=None, description="How many routed experts a layer.")
    top_k: Count | None = Field(default=None, description="How many a token is routed to.")
    fingerprint: Fingerprint | None = Field(
        default=None, description="Of its routers' weights: the profile is for no other weights."
    )


class NeverMaskSpec(Spec):
    """Experts that the model cannot do without."""

    layer: Layer | None = Field(default=None, description="The model's own layer number.")
    layers: LayerRanges | None = Field(default=None, description="Several of them.")
    experts: ExpertRanges = Field(description="Logical expert ids, and ranges such as 90-95.")
    reason: str = Field(default="", description="Why, for people.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, ["layer", "layers"], "the entry")


class ProtectiveSpec(Spec):
    """A set that makes the model refuse, or keeps it safe in another way: no policy may mask it."""

    override: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Why policies may mask it all the same, for people."
    )


class ProfileEntrySpec(ListedEntrySpec):
    weights: Annotated[dict[ExpertKey, Weight], Field(min_length=1)] | None = Field(
        default=None, description="Expert id to weight."
    )


class ProbeEntrySpec(Spec):
    layer: Layer = Field(description="The model's own layer number.")
    weights: Annotated[dict[ExpertKey, Weight], Field(min_length=1)] = Field(
        description="Expert id to weight."
    )


class ProbeSpec(Spec):
    """σ(Σ weights of the window's chosen experts / its tokens + bias)."""

    bias: Number = Field(default=0.0, description="Added before the logistic function.")
    weights: Annotated[tuple[ProbeEntrySpec, ...], Field(min_length=1)] = Field(
        description="Of experts; those that are not named weigh nothing."
    )


class BaselinesSpec(Spec):
    """How often each expert is chosen on benign traffic."""

    tokens: Count | None = Field(default=None, description="On how many tokens it was measured.")
    rates: Annotated[
        dict[LayerKey, Annotated[tuple[Rate, ...], Field(min_length=1)]], Field(min_length=1)
    ] = Field(
        description="Layer to the mean selections a token of each expert, by its id; they add up to "
        "the layer's top-k."
    )


class BudgetSpec(Spec):
    """The threshold that benign traffic passes at a rate of `budget`."""

    budget: Budget = Field(description="The false-positive rate.")
    above: Number | None = Field(default=None, description="Benign values are > this at that rate.")
    at_least: Number | None = Field(default=None, description="The same with >=.")
    below: Number | None = Field(default=None, description="Benign values are < this at that rate.")
    at_most: Number | None = Field(default=None, description="The same with <=.")

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        yield from cls.exactly_one(data, [c.value for c in Comparison], "a budget")

    @property
    def comparison(self) -> tuple[Comparison, float]:
        given = zip(Comparison, (self.above, self.at_least, self.below, self.at_most), strict=True)
        return next((which, value) for which, value in given if value is not None)


class CalibratedThresholdSpec(Spec):
    phase: PhaseWord = Field(default=Phase.ANY, description="Of the rules that it is for.")
    when: ExpressionMeasureSpec = Field(
        description="The condition, without a threshold; `experts` names a set of this profile."
    )
    budgets: Annotated[tuple[BudgetSpec, ...], Field(min_length=1)] = Field(
        description="Thresholds by false-positive rate, all upwards or all downwards."
    )

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        budgets = data.get("budgets")
        upward = None
        for index, item in enumerate(budgets if isinstance(budgets, tuple) else ()):
            given = [c for c in Comparison if isinstance(item, Mapping) and c.value in item]
            if len(given) == 1 and upward is not None and given[0].upward is not upward:
                text = "the thresholds of one condition point the same way; write two entries"
                yield Problem(("budgets", index), text)
            if len(given) == 1 and upward is None:
                upward = given[0].upward


class ProfileDocument(Spec):
    """A profile: one JSON file."""

    api_version: Annotated[Literal["moe-guard/v1"], BeforeValidator(word([API_VERSION]))] = Field(
        description="The version of the policy language."
    )
    kind: Annotated[Literal["Profile"], BeforeValidator(word([PROFILE]))] = Field(
        description="What the document is."
    )
    model: ProfileModelSpec = Field(description="The model that was profiled.")
    provenance: Any = Field(
        default=None, description="Where it comes from: data, commands, versions, licence."
    )
    never_mask: tuple[NeverMaskSpec, ...] = Field(
        default=(), description="Experts that no policy may mask."
    )
    sets: dict[SetName, Annotated[tuple[ProfileEntrySpec, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="Named sets of experts."
    )
    protective: dict[SetName, ProtectiveSpec] = Field(
        default_factory=dict, description="Those of `sets` that no policy may mask."
    )
    baselines: BaselinesSpec | None = Field(default=None, description="Activation on benign traffic.")
    thresholds: tuple[CalibratedThresholdSpec, ...] = Field(
        default=(), description="Calibrated thresholds."
    )
    probes: dict[SetName, ProbeSpec] = Field(default_factory=dict, description="Linear probes.")
    statistics: dict[SetName, SetStatisticsSpec] = Field(
        default_factory=dict, description="What sets and probes rest on, as `discover` found it."
    )
    causal: dict[SetName, CausalCheckSpec] = Field(
        default_factory=dict,
        description="What masking a set does. One that did not pass is masked by no policy.",
    )
    data: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the traces it was made from, by file name."
    )
    licence: str = Field(default="", description="Of the profile.")
