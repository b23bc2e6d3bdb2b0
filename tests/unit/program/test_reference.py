"""The exact semantics of the policy language, sentence by sentence, worked out by hand.

A routing is written as a text: `F` is a token that chooses the flagged expert, `.` one that does
not, and `|` ends the prompt. `F.|F` has the prompt positions 0 and 1 and the output position 2.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from guard.policy.fault import Location
from guard.policy.model import (
    Action,
    All,
    AnyOf,
    Baselines,
    Block,
    Comparison,
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Expression,
    Mask,
    MaskUntil,
    Mode,
    NamedWindow,
    Not,
    Observe,
    Persist,
    Phase,
    Policy,
    PolicySet,
    Reduce,
    Rule,
    Together,
    TogetherIn,
    Window,
)
from guard.program.applicability import RequestFacts
from guard.program.reference import evaluate
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import BlockedAt, Evidence, MaskInterval, Routing, Verdict

HERE = Location("policy.yaml", 1, 1)
ONE_LAYER = Topology("TestMoe", (MoELayer(5, 4, 2),))
TWO_LAYERS = Topology("TestMoe", (MoELayer(2, 4, 2), MoELayer(7, 3, 1)))
TOKEN, PROMPT, OUTPUT, REQUEST = NamedWindow


def experts(*ids: int, layer: int = 5) -> ExpertSet:
    return ExpertSet("set", (ExpertEntry((layer,), dict.fromkeys(ids, 1.0), HERE),), HERE)


def weighted(weights: dict[int, float]) -> ExpertSet:
    return ExpertSet("set", (ExpertEntry((5,), weights, HERE),), HERE)


FLAGGED = experts(0)
ALWAYS = Condition(ConditionKind.ALWAYS, "always", HERE)


def condition(
    kind: str = "count",
    over: Window = TOKEN,
    comparison: str = "atLeast",
    threshold: float = 1.0,
    *,
    of: ExpertSet = FLAGGED,
    min_tokens: int = 1,
    bias: float = 0.0,
    label: str = "",
    together: Together | None = None,
    baselines: Baselines | None = None,
    reduce: Reduce = Reduce.MAX,
) -> Condition:
    kind_, comparison_ = ConditionKind(kind), Comparison(comparison)
    return Condition(
        kind_, label or kind, HERE, None if kind_.reads_distribution else of, over, min_tokens,
        comparison_, threshold, bias, together=together, baselines=baselines, reduce=reduce,
    )  # fmt: skip


SEES_F = condition()  # true on every F, false on every other token
NEVER_KNOWN = condition(over=30, min_tokens=30)


def rule(
    when: Expression = SEES_F,
    then: Action | None = None,
    *,
    name: str = "r",
    phase: Phase = Phase.ANY,
    persist: tuple[int, int] = (1, 1),
) -> Rule:
    return Rule(name, when, then or Observe(), HERE, phase, Persist(*persist))


def mask(until: MaskUntil = "request-end") -> Mask:
    return Mask(experts(1), HERE, until=until)


def policy(*rules: Rule, name: str = "p", mode: Mode = Mode.ENFORCE) -> Policy:
    return Policy(name, HERE, mode, rules=rules)


def policies(*members: Policy) -> PolicySet:
    return PolicySet(members, revision="")


def routing(text: str, *, first_seen: int = 0) -> Routing:
    """F chooses experts 0 and 3, every other token 2 and 3; each with half of the gate weight."""
    prompt, _, output = text.partition("|")
    ids = [[[0 if token == "F" else 2, 3]] for token in prompt + output]
    topk_ids = np.array(ids, dtype=np.int32)
    return Routing(topk_ids, np.full(topk_ids.shape, 0.5, np.float32), len(prompt), first_seen)


def run(text: str, *rules: Rule, first_seen: int = 0) -> Verdict:
    return evaluate(policies(policy(*rules)), ONE_LAYER, routing(text, first_seen=first_seen))


def positions(verdict: Verdict) -> list[int]:
    return [firing.position for firing in verdict.firings]


def intervals(verdict: Verdict) -> list[tuple[int, int | None]]:
    return [(interval.start, interval.stop) for interval in verdict.masks]


def value_at(
    position: int,
    measured: Condition,
    routed: Routing,
    *,
    phase: Phase = Phase.ANY,
    topology: Topology = ONE_LAYER,
) -> float:
    """The evidence of a rule that is always true and persists so long that it fires right there."""
    first = routed.num_prompt_tokens if phase is Phase.OUTPUT else routed.first_seen
    num_evaluations = position - first + 1
    probe = rule(AnyOf((ALWAYS, measured)), phase=phase, persist=(num_evaluations, num_evaluations))
    (firing,) = evaluate(policies(policy(probe)), topology, routed).firings
    assert firing.position == position
    return firing.evidence[1].value


# Firing


def test_a_rule_fires_when_its_result_turns_true_and_again_after_it_was_false() -> None:
    assert positions(run("FF.|.FF.F", rule())) == [0, 4, 7]


def test_a_prompt_rule_evaluates_the_prompt_alone() -> None:
    assert positions(run(".F.|FF", rule(phase=Phase.PROMPT))) == [1]


def test_an_output_rule_evaluates_the_output_alone() -> None:
    assert positions(run("FF|.F", rule(phase=Phase.OUTPUT))) == [3]


def test_an_output_rule_fires_at_the_first_output_position_though_the_prompt_ended_true() -> None:
    assert positions(run("FF|F", rule(phase=Phase.OUTPUT))) == [2]


def test_unseen_positions_are_not_evaluated() -> None:
    assert positions(run("FFF.|.", rule(), first_seen=2)) == [2]


def test_firings_come_by_position_then_in_deciding_order() -> None:
    late = rule(condition(over=REQUEST, threshold=2.0), name="late")
    verdict = run("FF|", late, rule(name="early"), rule(ALWAYS, name="static"))
    assert [(f.position, f.rule) for f in verdict.firings] == [
        (0, "early"),
        (0, "static"),
        (1, "late"),
    ]


def test_a_policy_that_is_off_is_skipped_even_if_a_request_enforces_it() -> None:
    silent = policies(policy(rule(then=mask()), rule(then=Block()), mode=Mode.OFF))
    verdict = evaluate(silent, ONE_LAYER, routing("F|F"), facts=RequestFacts(enforced=frozenset({"p"})))
    assert verdict == Verdict((), (), None)


# Windows


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (TOKEN, [1, 0, 1, 1, 0]),
        (2, [1, 1, 1, 2, 1]),
        (4, [1, 1, 2, 3, 2]),
        (PROMPT, [None, None, 2, 2, 2]),
        (OUTPUT, [None, None, None, 1, 1]),
        (REQUEST, [1, 1, 2, 3, 3]),
    ],
)
def test_a_window_ends_at_the_position(over: Window, expected: list[int | None]) -> None:
    for position, count in enumerate(expected):
        value = value_at(position, condition(over=over), routing("F.F|F."))
        assert math.isnan(value) if count is None else value == count


def test_the_phase_of_an_output_rule_limits_numeric_windows() -> None:
    assert value_at(2, condition(over=2), routing("FF|FF"), phase=Phase.OUTPUT) == 1
    assert value_at(3, condition(over=3), routing("FF|FF"), phase=Phase.OUTPUT) == 2


def test_named_windows_keep_their_meaning_in_an_output_rule() -> None:
    routed = routing("FF|F.")
    assert value_at(2, condition(over=PROMPT), routed, phase=Phase.OUTPUT) == 2
    assert value_at(3, condition(over=REQUEST), routed, phase=Phase.OUTPUT) == 3
    assert value_at(3, condition(over=OUTPUT), routed, phase=Phase.OUTPUT) == 1
    assert value_at(3, condition(over=TOKEN), routed, phase=Phase.OUTPUT) == 0


def test_an_output_window_in_a_prompt_rule_is_never_known() -> None:
    unknown_or_not = condition(over=OUTPUT, threshold=0.0)
    assert positions(run("FF|FF", rule(unknown_or_not, phase=Phase.PROMPT))) == []


@pytest.mark.parametrize(("over", "expected"), [(REQUEST, 0.5), (3, 0.5), (PROMPT, 0.0)])
def test_unseen_tokens_are_not_in_a_window(over: Window, expected: float) -> None:
    routed = routing("FF.|F", first_seen=2)
    assert value_at(3, condition("rate", over), routed) == expected


def test_below_min_tokens_a_value_is_unknown() -> None:
    routed = routing("FFFF|")
    assert math.isnan(value_at(1, condition(over=REQUEST, min_tokens=3), routed))
    assert value_at(2, condition(over=REQUEST, min_tokens=3), routed) == 3


def test_unseen_tokens_do_not_count_towards_min_tokens() -> None:
    routed = routing("FFFF|", first_seen=2)
    assert math.isnan(value_at(3, condition(over=4, min_tokens=3), routed))


def test_a_window_without_tokens_is_unknown_whatever_its_floor() -> None:
    assert math.isnan(value_at(0, condition(over=OUTPUT, min_tokens=0), routing("F|")))


# Values

# Two tokens on two layers of 4 and 3 experts that choose 2 and 1.
TWO_TOKENS = Routing(
    np.array([[[0, 1], [2, -1]], [[1, 3], [0, -1]]], dtype=np.int32),
    np.array([[[0.75, 0.25], [1.0, 9.0]], [[0.5, 0.5], [1.0, 9.0]]], dtype=np.float32),
    num_prompt_tokens=2,
)
ACROSS = ExpertSet(  # experts 0 and 1 of layer 2, expert 2 of layer 7; expert 1 is named twice
    "across",
    (
        ExpertEntry((2,), {0: 0.8, 1: -0.2}, HERE),
        ExpertEntry((2,), {1: -0.2}, HERE),
        ExpertEntry((7,), {2: 0.5}, HERE),
    ),
    HERE,
)


@pytest.mark.parametrize(
    ("kind", "over", "expected"),
    [
        ("count", TOKEN, 1.0),  # of the second token: expert 1 of layer 2
        ("count", REQUEST, 4.0),  # 0, 1 and layer 7's 2, then 1
        ("rate", TOKEN, 1 / 3),  # three distinct experts
        ("rate", REQUEST, 4 / 6),
        ("mass", TOKEN, 0.25),  # 0.5 of 0.5 + 0.5 + 1
        ("mass", REQUEST, 0.625),  # 2.5 of 4
        ("score", TOKEN, -0.2),
        ("score", REQUEST, 0.45),  # (0.8 - 0.2 + 0.5 - 0.2) / 2
    ],
)
def test_a_value_sums_over_tokens_layers_and_distinct_experts(
    kind: str, over: Window, expected: float
) -> None:
    measured = condition(kind, over, of=ACROSS)
    assert value_at(1, measured, TWO_TOKENS, topology=TWO_LAYERS) == expected


def test_mass_is_a_share_of_the_layers_of_the_set_alone() -> None:
    measured = condition("mass", REQUEST, of=experts(0, layer=7))
    assert value_at(1, measured, TWO_TOKENS, topology=TWO_LAYERS) == 0.5


def test_an_expert_named_twice_counts_once_in_a_rate() -> None:
    entry = FLAGGED.entries[0]
    twice = ExpertSet("set", (entry, entry), HERE)
    assert value_at(0, condition("rate", of=twice), routing("F|")) == 1.0


def test_bias_is_added_once_to_a_score() -> None:
    measured = condition("score", REQUEST, of=weighted({0: 0.5}), bias=-0.1)
    assert value_at(3, measured, routing("FF..|")) == 0.15


def test_a_padding_id_is_not_chosen() -> None:
    padded = Routing(np.array([[[0, -1]]], np.int32), np.array([[[0.25, 0.75]]], np.float32), 1)
    assert value_at(0, condition("mass"), padded) == 1.0


def test_an_expert_of_weight_zero_is_not_chosen() -> None:
    idle = Routing(np.array([[[0, 3]]], np.int32), np.array([[[0.0, 1.0]]], np.float32), 1)
    assert value_at(0, condition("count"), idle) == 0
    assert value_at(0, condition("score"), idle) == 0


def test_a_share_of_no_gate_weight_is_unknown() -> None:
    nothing = Routing(np.full((1, 1, 2), -1, np.int32), np.ones((1, 1, 2), np.float32), 1)
    assert math.isnan(value_at(0, condition("mass"), nothing))
    assert value_at(0, condition("rate"), nothing) == 0


def test_weights_add_as_the_decimals_that_were_written() -> None:
    thirds = weighted({0: 0.1, 3: 0.2})  # as floats, 0.1 + 0.2 is above 0.3
    above = condition("score", comparison="above", threshold=0.3, of=thirds)
    assert positions(run("F|", rule(above))) == []
    at_least = condition("score", comparison="atLeast", threshold=0.3, of=thirds)
    assert positions(run("F|", rule(at_least))) == [0]


def test_a_value_is_rounded_once_before_it_meets_its_threshold() -> None:
    third = condition("rate", REQUEST, "atLeast", 1 / 3, min_tokens=3)
    assert positions(run("F..|", rule(third))) == [2]
    # 6 selections of 3 experts in 5 tokens: 6 / 5 / 3 rounds twice, and not to 0.4.
    assert value_at(4, condition("rate", REQUEST, of=experts(0, 1, 3)), routing("F....|")) == 0.4


@pytest.mark.parametrize(
    ("least", "of", "expected"),
    [
        (1, TogetherIn.MEMBERS, 2),  # both tokens
        (3, TogetherIn.MEMBERS, 1),  # the first: experts 0 and 1 of layer 2, expert 2 of layer 7
        (4, TogetherIn.MEMBERS, 0),
        (1, TogetherIn.LAYERS, 2),
        (2, TogetherIn.LAYERS, 1),  # the first: layers 2 and 7; the second's expert 0 is no member
        (3, TogetherIn.LAYERS, 0),
    ],
)
def test_tokens_are_counted_that_chose_enough_of_a_set_together(
    least: int, of: TogetherIn, expected: int
) -> None:
    measured = condition("coactivation", REQUEST, of=ACROSS, together=Together(least, of))
    assert value_at(1, measured, TWO_TOKENS, topology=TWO_LAYERS) == expected


def test_selections_of_dormant_experts_are_counted() -> None:
    measured = condition("dormant", REQUEST, of=experts(0, 2))
    assert value_at(3, measured, routing("F..F|")) == 4


def test_a_probe_is_a_probability() -> None:
    # Expert 0 in 1 token of 2: 3 · 1/2 - 0.5 = 1, and 1 / (1 + e^-1).
    measured = condition("probe", REQUEST, of=weighted({0: 3.0}), bias=-0.5)
    assert value_at(1, measured, routing("F.|")) == pytest.approx(0.7310585786300049, rel=1e-15)


@pytest.mark.parametrize(
    ("comparison", "threshold", "expected"),
    [
        ("atLeast", 0.5, [0]),  # 0.3 - 0.1 - 0.2 is 0 in decimals
        ("above", 0.5, []),
        ("atLeast", 0.6, []),
        ("above", 0.4, [0]),
        ("below", 1.0, [0]),
        ("atMost", 0.0, []),
    ],
)
def test_a_probe_meets_one_half_where_its_score_is_nothing(
    comparison: str, threshold: float, expected: list[int]
) -> None:
    of = weighted({0: 0.3, 3: -0.1})
    measured = condition("probe", TOKEN, comparison, threshold, of=of, bias=-0.2)
    assert positions(run("F|", rule(measured))) == expected


HALF_AND_TENTH = Baselines(None, {5: (0.5, 0.1, 0.7, 0.7)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Experts 0 and 1 of F: b = 0.3. With |W| = 5, e = 0.5 / 10.
        (".....|", math.log(0.35 / 0.05)),
        ("F....|", math.log(0.35 / 0.15)),
        ("FFF..|", 0.0),  # as often as in the profile: r = 3 / 10
        ("FFFFF|", math.log(0.35 / 0.55)),
    ],
)
def test_a_set_is_suppressed_by_the_logarithm_of_how_much_less_it_is_used(
    text: str, expected: float
) -> None:
    of = experts(0, 1)
    measured = condition("suppressed", REQUEST, of=of, baselines=HALF_AND_TENTH)
    assert value_at(4, measured, routing(text)) == pytest.approx(expected, abs=1e-15)


# Layer 2 of `TWO_TOKENS` chose experts 0, 1 and 1, 3: counts 1, 2, 0, 1. Layer 7 chose 2 and 0.
UNEVEN = Baselines(None, {2: (1.0, 0.5, 0.0, 0.5), 7: (0.5, 0.0, 0.5)})
LN = math.log


@pytest.mark.parametrize(
    ("kind", "reduce", "over", "expected"),
    [
        # Layer 2: 1 / ((1/4)² + (1/2)² + (1/4)²) = 8/3; layer 7: 1 / (1/4 + 1/4) = 2.
        ("entropy", Reduce.MAX, REQUEST, (8 / 3 + 2) / 2),
        ("entropy", Reduce.MAX, TOKEN, (2 + 1) / 2),
        # Layer 2: 1/2 · 4/2; layer 7: 1/2 · 3/1.
        ("concentration", Reduce.MAX, REQUEST, (1.0 + 1.5) / 2),
        ("concentration", Reduce.MAX, TOKEN, (1.0 + 3.0) / 2),
        # Layer 2: p = (1/4, 1/2, 0, 1/4), q = (1/2, 1/4, 0, 1/4), m = (3/8, 3/8, 0, 1/4):
        # p: 1/4 ln 2/3 + 1/2 ln 4/3, q the same, so their mean is that. Layer 7: p = q.
        ("divergence", Reduce.MAX, REQUEST, LN(2 / 3) / 4 + LN(4 / 3) / 2),
        ("divergence", Reduce.MEAN, REQUEST, (LN(2 / 3) / 4 + LN(4 / 3) / 2) / 2),
        # Of the second token, layer 7: p = (1, 0, 0), q = (1/2, 0, 1/2), m = (3/4, 0, 1/4).
        ("divergence", Reduce.MAX, TOKEN, (LN(4 / 3) + LN(2 / 3) / 2 + LN(2) / 2) / 2),
    ],
)
def test_a_distribution_is_of_each_layers_selections(
    kind: str, reduce: Reduce, over: Window, expected: float
) -> None:
    measured = condition(kind, over, baselines=UNEVEN, reduce=reduce)
    value = value_at(1, measured, TWO_TOKENS, topology=TWO_LAYERS)
    assert value == pytest.approx(expected, abs=1e-15)


def test_a_layer_without_a_selection_or_a_baseline_is_left_out() -> None:
    ids = np.array([[[0, 1], [-1, -1]]], dtype=np.int32)
    half = Routing(ids, np.ones(ids.shape, np.float32), num_prompt_tokens=1)
    assert value_at(0, condition("entropy", TOKEN), half, topology=TWO_LAYERS) == 2.0
    unknown = Baselines(None, {7: (0.5, 0.0, 0.5)})
    measured = condition("divergence", TOKEN, baselines=unknown)
    assert math.isnan(value_at(0, measured, half, topology=TWO_LAYERS))


def test_a_distribution_is_known_from_the_last_prompt_token_on() -> None:
    values = [value_at(p, condition("entropy", REQUEST), routing("FF..|FF")) for p in range(6)]
    assert [math.isnan(value) for value in values] == [True, True, True, False, False, False]
    # Experts 0 and 2 twice, 3 four times.
    assert values[3] == pytest.approx(1 / (1 / 16 + 1 / 16 + 1 / 4))


@pytest.mark.parametrize(
    ("comparison", "expected"), [("above", []), ("atLeast", [4]), ("below", []), ("atMost", [4])]
)
def test_a_logarithm_meets_a_threshold_that_rounding_keeps_it_from(
    comparison: str, expected: list[int]
) -> None:
    measured = condition(
        "suppressed", REQUEST, comparison, math.log(0.35 / 0.15) + 3e-16, of=experts(0, 1),
        baselines=HALF_AND_TENTH, min_tokens=5,
    )  # fmt: skip
    assert positions(run("F....|", rule(measured))) == expected


@pytest.mark.parametrize(
    ("comparison", "at_0", "at_1", "at_2"),
    [
        ("above", False, False, True),
        ("atLeast", False, True, True),
        ("below", True, False, False),
        ("atMost", True, True, False),
    ],
)
def test_above_and_below_are_strict(comparison: str, at_0: bool, at_1: bool, at_2: bool) -> None:
    for text, holds in ((".", at_0), ("F", at_1), ("FF", at_2)):
        floor = len(text)
        measured = condition(over=REQUEST, comparison=comparison, min_tokens=floor)
        assert bool(positions(run(f"{text}|", rule(measured)))) is holds


def test_a_bias_adds_as_the_decimal_that_was_written() -> None:
    nothing_left = condition("score", REQUEST, of=weighted({0: 0.2}), bias=-0.1)
    assert value_at(1, nothing_left, routing("F.|")) == 0


def test_an_expert_that_the_model_lacks_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="not in the model"):
        run("F|", rule(condition(of=experts(0, layer=6))))


# Composition

TRUE, FALSE, UNKNOWN = ALWAYS, Not(ALWAYS), NEVER_KNOWN


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        (TRUE, True),
        (FALSE, False),
        (UNKNOWN, False),
        (Not(FALSE), True),
        (Not(UNKNOWN), False),
        (All((TRUE, TRUE)), True),
        (All((TRUE, FALSE)), False),
        (All((TRUE, UNKNOWN)), False),
        (Not(All((TRUE, FALSE))), True),
        (Not(All((TRUE, UNKNOWN))), False),
        (Not(All((UNKNOWN, FALSE))), True),  # false whatever the unknown one is
        (AnyOf((FALSE, TRUE)), True),
        (AnyOf((UNKNOWN, TRUE)), True),  # true whatever the unknown one is
        (AnyOf((FALSE, UNKNOWN)), False),
        (Not(AnyOf((FALSE, FALSE))), True),
        (Not(AnyOf((FALSE, UNKNOWN))), False),
    ],
)
def test_composition_is_three_valued_and_unknown_at_the_root_is_a_miss(
    when: Expression, holds: bool
) -> None:
    assert bool(positions(run(".|", rule(when)))) is holds


# Persistence


def test_persist_asks_for_hits_among_the_last_evaluations() -> None:
    #             0123456789
    verdict = run("F..F.FF..F|", rule(persist=(2, 3)))
    assert positions(verdict) == [5]  # 3 and 5; true until 7, whose last three have 5 and 6


def test_evaluations_not_yet_made_are_misses() -> None:
    assert positions(run(".....|", rule(Not(SEES_F), persist=(3, 5)))) == [2]
    assert positions(run(".....|", rule(Not(SEES_F), persist=(3, 3)))) == [2]


def test_persist_counts_the_evaluations_of_its_own_phase() -> None:
    assert positions(run("FFF|FF", rule(phase=Phase.OUTPUT, persist=(2, 2)))) == [4]


def test_an_unknown_evaluation_is_a_miss() -> None:
    known_from_2 = condition(over=REQUEST, threshold=0.0, min_tokens=3)
    assert positions(run("....|", rule(known_from_2, persist=(2, 2)))) == [3]


# Evidence


def test_evidence_names_every_condition_in_the_order_written() -> None:
    when = AnyOf(
        (
            Not(All((NEVER_KNOWN, condition("rate", label="rate", threshold=0.25)))),
            condition(label="count#2", threshold=7.0),
            ALWAYS,
        )
    )
    ((_, _, _, evidence, _),) = run("F|", rule(when)).firings
    assert math.isnan(evidence[0].value)
    assert (evidence[0].condition, evidence[0].threshold) == ("count", 1.0)
    assert evidence[1:] == (
        Evidence("rate", 1.0, 0.25),
        Evidence("count#2", 1.0, 7.0),
        Evidence("always", 1.0, 0.0),
    )


# Masks


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        # From the first output position computed after the firing.
        ("F..|..", "request-end", [(3, None)]),
        ("..F|..", "request-end", [(3, None)]),
        ("...|F.", "request-end", [(4, None)]),
        ("...|.F", "request-end", [(5, None)]),
        # Never released, and one mask however often the rule fires.
        ("F.F|.F.", "request-end", [(3, None)]),
        # A number of positions from the first one masked.
        ("F..|....", 2, [(3, 5)]),
        ("...|F....", 2, [(4, 6)]),
        ("...|.F...", 3, [(5, 8)]),
        ("...|.F..", 3, [(5, None)]),  # position 7 is behind the routing, and masked
        # Restarted by another firing: within it, touching it, behind it.
        ("..|F.F....", 3, [(3, 8)]),
        ("..|F.F....", 2, [(3, 7)]),
        ("..|F.F....", 1, [(3, 4), (5, 6)]),
        ("F.F|....", 2, [(3, 5)]),  # both firings mask from 3
        # A rule that stays true does not fire again.
        ("..|FFF....", 2, [(3, 5)]),
        # Released when the result turns false.
        ("..|FF....", "clear", [(3, 5)]),
        ("..|F.F.F", "clear", [(3, 4), (5, 6), (7, None)]),
        (".F|.F.", "clear", [(2, 3), (4, 5)]),
        ("FF|FF", "clear", [(2, None)]),
        ("F.|..", "clear", []),
        ("F.F.F|..", "clear", [(5, 6)]),
    ],
)
def test_a_mask_holds_from_the_output_position_after_its_firing(
    text: str, until: MaskUntil, expected: list[tuple[int, int | None]]
) -> None:
    assert intervals(run(text, rule(then=mask(until)))) == expected


def test_a_prompt_rule_keeps_its_last_result_on_the_output() -> None:
    assert intervals(run("FF|..", rule(then=mask("clear"), phase=Phase.PROMPT))) == [(2, None)]


def test_a_mask_that_clears_with_persistence_outlasts_single_misses() -> None:
    verdict = run("..|FF.F...", rule(then=mask("clear"), persist=(2, 3)))
    assert intervals(verdict) == [(4, 7)]  # fires at 3; at 4 and 5 two of three; at 6 one


@pytest.mark.parametrize(
    ("phase", "until", "expected"),
    [
        (Phase.ANY, "request-end", [(0, None)]),
        (Phase.PROMPT, "request-end", [(0, None)]),
        (Phase.OUTPUT, "request-end", [(3, None)]),
        (Phase.ANY, "clear", [(0, None)]),
        (Phase.PROMPT, "clear", [(0, None)]),
        (Phase.ANY, 2, [(0, 2)]),
        (Phase.OUTPUT, 1, [(3, 4)]),
    ],
)
def test_always_alone_masks_from_the_first_token_of_its_phase(
    phase: Phase, until: MaskUntil, expected: list[tuple[int, int | None]]
) -> None:
    verdict = run("...|..", rule(ALWAYS, mask(until), phase=phase), first_seen=1)
    assert intervals(verdict) == expected
    assert positions(verdict) == [3 if phase is Phase.OUTPUT else 1]


def test_always_within_a_larger_condition_masks_the_output_only() -> None:
    assert intervals(run("...|..", rule(All((ALWAYS,)), mask()))) == [(3, None)]


def test_masks_come_by_start_then_in_deciding_order() -> None:
    verdict = run(
        "..|F..",
        rule(then=mask(), name="a"),
        rule(ALWAYS, mask(), name="b"),
        rule(then=mask(1), name="c"),
    )
    assert verdict.masks == (
        MaskInterval("p", "b", 0, None),
        MaskInterval("p", "a", 3, None),
        MaskInterval("p", "c", 3, 4),
    )


def test_audit_fires_and_withholds_its_mask_and_its_block() -> None:
    audit = policies(policy(rule(then=mask()), rule(then=Block()), mode=Mode.AUDIT))
    verdict = evaluate(audit, ONE_LAYER, routing("F|F"))
    assert positions(verdict) == [0, 0]
    assert (verdict.masks, verdict.blocked) == ((), None)


def test_a_request_can_enforce_the_audit_policies_that_it_names() -> None:
    audits = policies(
        policy(rule(then=mask()), name="a", mode=Mode.AUDIT),
        policy(rule(then=mask()), name="b", mode=Mode.AUDIT),
    )
    verdict = evaluate(audits, ONE_LAYER, routing("F|F"), facts=RequestFacts(enforced=frozenset({"b"})))
    assert verdict.masks == (MaskInterval("b", "r", 1, None),)


def test_a_mask_starts_and_ends_behind_what_was_computed_in_the_same_step() -> None:
    # Steps route positions 0-1, 2-4, 5-6 and 7-8 together.
    last_of_step = [1, 1, 4, 4, 4, 6, 6, 8, 8]
    verdict = evaluate(
        policies(policy(rule(then=mask("clear")))),
        ONE_LAYER,
        routing("..|F..F.F."),  # 2 fires and 3 releases in one step; 5 fires, 6 releases, 7 fires
        num_computed_ahead=lambda position: last_of_step[position] - position,
    )
    assert positions(verdict) == [2, 5, 7]
    assert intervals(verdict) == []

    verdict = evaluate(
        policies(policy(rule(then=mask("clear")))),
        ONE_LAYER,
        routing("..|FFFF..."),  # 2 fires, 6 releases
        num_computed_ahead=lambda position: last_of_step[position] - position,
    )
    assert intervals(verdict) == [(5, 7)]


# Blocks


@pytest.mark.parametrize(
    ("text", "position"), [("F..|..", 2), ("..F|..", 2), ("...|F.", 3), ("...|.F", 4)]
)
def test_a_block_acts_at_its_firing_but_not_before_the_last_prompt_token(
    text: str, position: int
) -> None:
    assert run(text, rule(then=Block())).blocked == BlockedAt(position, "p", "r")


def test_the_first_block_in_deciding_order_is_named_among_those_of_one_position() -> None:
    late = rule(condition(over=REQUEST, threshold=2.0), Block(), name="decides first")
    early = rule(then=Block(), name="fires first")
    assert run("FF.|", late, early).blocked == BlockedAt(2, "p", "decides first")
    assert run("...|FF", late, early).blocked == BlockedAt(3, "p", "fires first")


def test_all_that_fires_up_to_the_block_is_reported_and_nothing_behind_it() -> None:
    blocks = rule(then=Block(), name="blocks")
    verdict = run("F.F|F.F", blocks, rule(name="watches"))
    assert [(f.position, f.rule) for f in verdict.firings] == [
        (0, "blocks"),
        (0, "watches"),
        (2, "blocks"),
        (2, "watches"),
    ]


def test_a_mask_that_would_start_behind_the_block_is_not_reported() -> None:
    masks = rule(then=mask(2))
    blocks = rule(condition(over=REQUEST, threshold=2.0), Block())
    assert run("F.F|...", masks, blocks).masks == ()
    verdict = run("F..|..F...", masks, blocks)
    assert (verdict.blocked, intervals(verdict)) == (BlockedAt(5, "p", "r"), [(3, 5)])


def test_a_mask_in_force_at_the_block_has_no_end() -> None:
    blocks = rule(condition(over=REQUEST, threshold=2.0), Block())
    assert intervals(run("F..|F....", rule(then=mask(2)), blocks)) == [(3, None)]


def test_a_block_is_not_reported_where_the_routing_ends_within_the_prompt() -> None:
    partial = routing("F..|")._replace(num_prompt_tokens=5)
    verdict = evaluate(policies(policy(rule(then=Block()))), ONE_LAYER, partial)
    assert (positions(verdict), verdict.blocked) == ([0], None)
