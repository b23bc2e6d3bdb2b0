"""The schema of what a profile's sets rest on: statistics of `discover`, outcomes of `causal`.

Numbers are for people and for reports. Only whether a set passed its causal check binds a policy.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from guard.policy.scalars import Count, ExpertId, Layer, Number, PhaseWord
from guard.policy.spec import Spec

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Interval = tuple[Number, Number]


class ExpertEffectSpec(Spec):
    layer: Layer = Field(description="The model's own layer number.")
    expert: ExpertId = Field(description="Logical expert id.")
    effect: Number = Field(description="Mean difference of activation rates, target less reference.")
    interval: Interval = Field(description="Its 95 % bootstrap interval.")
    mass_effect: Number | None = Field(default=None, description="The same of gate weight.")
    log_odds: Number | None = Field(default=None, description="Smoothed log odds ratio.")
    q: Share = Field(description="The false discovery rate at which it is still found.")
    family_p: Share | None = Field(
        default=None, description="The probability that any expert at all comes out as far by chance."
    )
    stability: Share = Field(description="The share of resamples in which it is among the top.")
    topic_effect: Number | None = Field(
        default=None, description="The largest difference between two categories of reference prompts."
    )
    same_token_effect: Number | None = Field(
        default=None, description="The effect on the same tokens alone."
    )


class ProbeQualitySpec(Spec):
    in_domain: Share | None = Field(
        default=None, description="Area under the ROC curve on pairs left out."
    )
    held_out: dict[str, Share] = Field(
        default_factory=dict, description="The same by category that was left out as a whole."
    )


class SetStatisticsSpec(Spec):
    """What `discover` found of a set."""

    target: str = Field(description="The label of the prompts that the set goes with.")
    reference: str = Field(description="The label of the prompts beside them.")
    phase: PhaseWord = Field(description="The tokens that counted.")
    pairs: Count = Field(description="Of prompts.")
    tokens: Count = Field(description="Of all prompts.")
    experts: tuple[ExpertEffectSpec, ...] = Field(description="Those with the largest effect first.")
    flagged_by_chance: Number | None = Field(
        default=None, description="Experts flagged with labels shuffled within pairs, on average."
    )
    probe: ProbeQualitySpec | None = Field(
        default=None, description="What the probe of the same name is worth."
    )


class TaskSpec(Spec):
    """Shares of exact answers."""

    prompts: Count = Field(description="Of the task.")
    unmasked: Share = Field(description="Without a mask.")
    masked: Share = Field(description="With the set masked.")
    random: Share = Field(description="With random sets masked, on average.")


class CausalCheckSpec(Spec):
    """What masking a set does, beside random sets of the same size, layers and use."""

    passed: bool = Field(description="A set that did not pass is not masked by any policy.")
    override: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Why policies may mask it although it did not pass, for people."
    )
    method: str = Field(description="Of the mask.")
    texts: Count = Field(description="Of the target label.")
    target_increase: Number = Field(description="Of the mean loss of target texts, nats a token.")
    target_interval: Interval = Field(description="Its 95 % bootstrap interval.")
    random_increases: Annotated[tuple[Number, ...], Field(min_length=1)] = Field(
        description="The same for each random set."
    )
    ratio: Number | None = Field(
        default=None,
        description="Of the increase to the random sets' mean; left out: they raised nothing.",
    )
    ratio_low: Number | None = Field(
        default=None, description="The lower end of its 95 % interval; left out as the ratio is."
    )
    reference_increase: Number = Field(
        description="Of the mean loss of reference texts, as a share of what it was."
    )
    reference_interval: Interval = Field(description="Its 95 % bootstrap interval.")
    tasks: TaskSpec | None = Field(default=None, description="Tasks with exact answers.")
    data: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of what it was computed from, by file name."
    )
