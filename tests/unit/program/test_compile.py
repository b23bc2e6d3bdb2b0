"""What compilation refuses against a model, what it shares, and what it costs."""

from __future__ import annotations

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy import Fault, PolicyError, parse_policies
from guard.policy.fault import Location
from guard.policy.model import (
    Comparison,
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Mask,
    Mode,
    Observe,
    Policy,
    PolicySet,
    Rule,
)
from guard.program.compile import compile_policies
from guard.program.fit import check_against
from guard.program.program import MaskRelease
from guard.program.topology import MoELayer, Topology

TOPOLOGY = Topology("Qwen3MoeForCausalLM", tuple(MoELayer(n, 8, 2) for n in (0, 2, 3, 5)))
HEAD = "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: NAME}\nspec:\n"


def document(spec: str, name: str = "p") -> str:
    return HEAD.replace("NAME", name) + spec


def faults_of(text: str, topology: Topology = TOPOLOGY) -> list[Fault]:
    with pytest.raises(PolicyError) as caught:
        compile_policies(parse_policies(text, "p.yaml"), topology)
    return list(caught.value.faults)


def mask_policy(name: str, ids: str, mode: str = "enforce", layer: int = 0) -> str:
    return document(
        f"  mode: {mode}\n"
        f"  experts: {{f: [{{layer: {layer}, experts: [{ids}]}}]}}\n"
        "  rules:\n"
        "    - {name: r, when: {always: {}}, then: {mask: {experts: f}}}\n",
        name,
    )


def test_an_expert_out_of_range_is_named_at_its_entry() -> None:
    text = document(
        "  experts:\n    f:\n      - {layer: 0, experts: [7]}\n      - {layer: 2, experts: [1, 8]}\n"
        "  rules: []\n"
    )

    (fault,) = faults_of(text)

    assert (fault.location.file, fault.location.line) == ("p.yaml", 8)
    assert "expert 8 of layer 2" in fault.message
    assert "0-7" in fault.message


def test_what_a_condition_takes_from_a_profile_is_checked_like_a_set() -> None:
    entry = ExpertEntry((2,), {9: 0.5}, Location("profile.json", 3, 4))
    probe = ExpertSet("probe", (entry,), entry.location)
    here = Location("p.yaml", 1, 1)
    condition = Condition(ConditionKind.PROBE, "probe", here, probe, threshold=0.5)
    policy = Policy("p", here, rules=(Rule("r", condition, Observe(), here),))

    (fault,) = check_against(PolicySet((policy,), "0"), TOPOLOGY)

    assert fault.location == entry.location
    assert "expert 9 of layer 2" in fault.message


def test_a_layer_that_is_dense_or_absent_is_named_with_those_there_are() -> None:
    text = document(
        "  experts:\n    f:\n      - {layers: 0-2, experts: [7]}\n      - {layer: 9, experts: [1]}\n"
        "  rules: []\n"
    )

    dense, absent = faults_of(text)

    assert (dense.location.line, absent.location.line) == (7, 8)
    assert "names layer 1, but the MoE layers of this model are 0, 2-3, 5" in dense.message
    assert "names layer 9" in absent.message


@pytest.mark.parametrize(
    ("requirement", "found"),
    [
        ("architecture: MixtralForCausalLM", "architecture: Qwen3MoeForCausalLM"),
        ("layers: 6", "layers: 4"),
        ("experts: 128", "experts: 8"),
        ("topK: 8", "topK: 2"),
    ],
)
def test_a_model_requirement_that_is_not_met_says_both_sides(requirement: str, found: str) -> None:
    (fault,) = faults_of(document(f"  model: {{{requirement}}}\n  rules: []\n"))

    assert requirement in fault.message
    assert found in fault.message
    assert fault.location.line == 5


def test_requirements_that_are_met_pass_and_uneven_models_meet_no_single_number() -> None:
    text = document("  model: {architecture: X, layers: 2, experts: 8, topK: 2}\n  rules: []\n")
    even = Topology("X", (MoELayer(0, 8, 2), MoELayer(1, 8, 2)))
    uneven = Topology("X", (MoELayer(0, 8, 2), MoELayer(1, 16, 2)))

    assert check_against(parse_policies(text), even) == []
    (fault,) = check_against(parse_policies(text), uneven)
    assert "experts: 8, 16" in fault.message


def test_masks_that_together_leave_too_few_experts_name_all_who_mask_that_layer() -> None:
    text = "---\n".join(
        [
            mask_policy("first", "0-3"),
            mask_policy("second", "3-6", mode="audit"),
            mask_policy("elsewhere", "0-5", layer=2),
            mask_policy("asleep", "7", mode="off"),
        ]
    )

    (fault,) = faults_of(text)

    assert "layer 0 chooses 2 of 8" in fault.message
    assert "first/r, second/r together only 1 are left" in fault.message
    assert "elsewhere" not in fault.message


def test_masks_that_leave_exactly_top_k_experts_pass() -> None:
    text = mask_policy("first", "0-3") + "---\n" + mask_policy("second", "2-5")

    compile_policies(parse_policies(text), TOPOLOGY)


def test_each_mask_action_has_the_code_of_its_method() -> None:
    methods = ["drop", "reroute", "force", "drop_renorm"]
    text = document(
        "  experts: {f: [{layer: 0, experts: [1]}]}\n  rules:\n"
        + "".join(
            f"    - {{name: r-{n}, when: always, then: {{mask: {{experts: f, method: {method}}}}}}}\n"
            for n, method in enumerate(methods)
        )
    )

    masks = compile_policies(parse_policies(text), TOPOLOGY).masks

    assert masks.method.tolist() == [2, 0, 3, 1]
    assert masks.expert_bits[0, 1].tolist() == [0b1111]


def test_every_layer_with_too_few_experts_is_a_fault_of_its_own() -> None:
    text = document(
        "  experts: {f: [{layers: 2-3, experts: [0-6]}]}\n"
        "  rules:\n    - {name: r, when: {always: {}}, then: {mask: {experts: f}}}\n"
    )

    assert [fault.message.split(" chooses")[0] for fault in faults_of(text)] == [
        "layer 2",
        "layer 3",
    ]


def test_equal_sets_share_a_signal_and_equal_windows_a_reading() -> None:
    rule = "    - {name: NAME, when: {count: {experts: SET, over: 4, atLeast: 1}}}\n"
    text = document(
        "  experts:\n"
        "    a: [{layer: 0, experts: [1, 2]}]\n"
        "    b: [{layer: 0, experts: [2]}, {layer: 0, experts: [1, 2]}]\n"
        "    c: [{layer: 0, weights: {1: 0.5, 2: 1}}]\n"
        "  rules:\n" + "".join(rule.replace("NAME", f"r-{s}").replace("SET", s) for s in "abc")
    )

    program = compile_policies(parse_policies(text), TOPOLOGY)

    assert len(program.signals.unit) == 1  # count and the metrics read members, not weights
    assert len(program.readings.signal) == 2  # tokens over 4, and the signal over 4
    assert {named.signal for named in program.sets} == {1}
    assert len(set(program.conditions.numerator.tolist())) == 1


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=8), st.integers(0, 6))
def test_weights_are_whole_at_their_scale_for_every_decimal_of_six_places(
    digits: list[int], places: int
) -> None:
    weights = {n: digit / 10**places for n, digit in enumerate(digits)}
    if max(map(abs, weights.values())) > 1000:
        return
    location = Location("p.yaml", 1, 1)
    experts = ExpertSet("f", (ExpertEntry((0,), weights, location),), location)
    condition = Condition(ConditionKind.SCORE, "score", location, experts, 4, 4, Comparison.ABOVE, 0.3)
    policy = Policy("p", location, rules=(Rule("r", condition, Mask(experts, location), location),))
    topology = Topology("X", (MoELayer(0, 16, 2),))

    program = compile_policies(PolicySet((policy,), "0"), topology)

    scale = Fraction(float(program.signals.scale[1]))
    table = program.signals.unit.by_place(16)[:, 0]
    assert [Fraction(float(table[n])) / scale for n in weights] == [
        Fraction(digit, 10**places) for digit in digits
    ]


def test_a_threshold_less_a_bias_is_taken_in_decimals() -> None:
    text = document(
        "  experts: {f: [{layer: 0, weights: {1: 0.2}}]}\n"
        "  rules:\n    - {name: r, when: {score: {experts: f, bias: 0.1, above: 0.3}}}\n"
    )

    assert compile_policies(parse_policies(text), TOPOLOGY).conditions.limit.tolist() == [0.2]


def test_mask_actions_beyond_a_word_go_on_in_the_next() -> None:
    text = "---\n".join(mask_policy(f"p-{n:03}", str(n % 6)) for n in range(66))

    masks = compile_policies(parse_policies(text), TOPOLOGY).masks

    assert (masks.num_actions, masks.num_words) == (66, 2)
    bits = masks.expert_bits.view(np.uint64)
    for action in range(66):
        column = (bits[0, :, action // 64] >> np.uint64(action % 64)) & np.uint64(1)
        assert column.nonzero()[0].tolist() == [action % 6]
    assert masks.static.all()
    assert (masks.release == MaskRelease.REQUEST_END).all()


def test_an_empty_set_compiles_to_a_program_that_cannot_act() -> None:
    program = compile_policies(PolicySet((), "0"), TOPOLOGY)

    assert (program.rules, program.sets, program.can_act) == ((), (), False)
    assert program.masks.num_words == 1
    assert program.readings.longest_tokens == 0


def test_policies_that_are_off_are_named_but_do_nothing() -> None:
    text = mask_policy("asleep", "0-6", mode="off") + "---\n" + mask_policy("awake", "1")

    program = compile_policies(parse_policies(text), TOPOLOGY)

    assert program.policies == ("asleep", "awake")
    assert [rule.policy for rule in program.rules] == ["awake"]


@pytest.mark.parametrize("num_experts", [16, 384])
def test_signals_take_memory_for_the_experts_that_are_named_and_not_for_the_model(
    num_experts: int,
) -> None:
    layers = 61
    topology = Topology("X", tuple(MoELayer(n, num_experts, 8) for n in range(layers)))
    text = document(
        "  experts:\n    f: [{layers: 0-9, experts: [1-3]}]\n    s: [{layer: 4, weights: {1: 0.5}}]\n"
        "  rules:\n"
        "    - {name: a, when: {mass: {experts: f, over: 4, above: 0.1}}}\n"
        "    - {name: b, when: {coactivation: {experts: f, layers: 2, over: token, atLeast: 1}}}\n"
        "    - {name: c, when: {score: {experts: s, above: 0.1}}}\n"
    )

    signals = compile_policies(parse_policies(text), topology).signals

    tables = (signals.unit, signals.spread, signals.mass, signals.layer_mass)
    # Members of f and of s, and s by weight; f; f; the ten layers of f.
    assert [len(table.place) for table in tables] == [30 + 1 + 1, 30, 30, 10]
    assert [len(table) for table in tables] == [3, 1, 1, 1]
    for table in tables:
        assert table.start.nbytes + table.place.nbytes + table.value.nbytes == (
            8 * (len(table) + 1) + 12 * len(table.place)
        )


def test_a_hundred_policies_over_a_large_model_stay_below_100_mb() -> None:
    topology = Topology("DeepseekV3ForCausalLM", tuple(MoELayer(n, 384, 8) for n in range(61)))
    location = Location("p.yaml", 1, 1)

    def policy(number: int) -> Policy:
        random = np.random.default_rng(number)
        ids = sorted(random.choice(300, 40, replace=False).tolist())
        layers = tuple(range(61))
        experts = ExpertSet("f", (ExpertEntry(layers, dict.fromkeys(ids, 1.0), location),), location)
        masked = ExpertSet("m", (ExpertEntry((number % 61,), {number: 1.0}, location),), location)
        kinds = (ConditionKind.RATE, ConditionKind.MASS, ConditionKind.COUNT)
        rules = tuple(
            Rule(
                kind,
                Condition(kind, kind, location, experts, 64, 16, Comparison.ABOVE, 0.1),
                Mask(masked, location),
                location,
            )
            for kind in kinds
        )
        return Policy(
            f"p-{number:03}", location, Mode.ENFORCE, experts={"f": experts, "m": masked},
            rules=rules,
        )  # fmt: skip

    policies = PolicySet(tuple(policy(n) for n in range(100)), "0")
    started = time.perf_counter()
    program = compile_policies(policies, topology)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    try:
        compile_policies(policies, topology)
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    print(f"compiled in {seconds:.2f} s, peak {peak_mb:.0f} MB")  # noqa: T201 (told, not asserted)

    assert len(program.rules) == 300
    assert peak_mb < 100
