"""Masks that a model could not honour, by layer, group and kind of router."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy import Fault, parse_policies
from guard.policy.fault import Location
from guard.policy.model import (
    Condition,
    ConditionKind,
    ExpertEntry,
    ExpertSet,
    Mask,
    MaskMethod,
    Mode,
    ModelRequirement,
    Policy,
    PolicySet,
    Profile,
    Rule,
)
from guard.program.fit import check_against
from guard.program.topology import PLAIN_SOFTMAX, MoELayer, Router, Topology
from guard.program.wording import ranges
from tests.support.support_facts import IN_A_KERNEL, MODES, Method
from tests.support.support_recorder import SupportRecord

DEEPSEEK_V3 = Router("sigmoid", num_groups=4, topk_groups=2, has_bias=True)
DEEPSEEK_V2 = Router("softmax", renormalize=False, num_groups=4, topk_groups=2)
HERE = Location("p.yaml", 7, 3)


def topology(
    router: Router = PLAIN_SOFTMAX, *, num_experts: int = 16, top_k: int = 4, number: int = 3
) -> Topology:
    return Topology("X", (MoELayer(number, num_experts, top_k, router),))


def policy(
    name: str, experts: set[int], method: str = "reroute", mode: Mode = Mode.ENFORCE, layer: int = 3
) -> Policy:
    entry = ExpertEntry((layer,), dict.fromkeys(experts, 1.0), Location("p.yaml", 5, 9))
    flagged = ExpertSet("f", (entry,), Location("p.yaml", 4, 5))
    rule = Rule(
        "r",
        Condition(ConditionKind.ALWAYS, "always", HERE),
        Mask(flagged, HERE, method=MaskMethod(method)),
        HERE,
    )
    return Policy(name, HERE, mode, experts={"f": flagged}, rules=(rule,))


def faults(model: Topology, *policies: Policy) -> list[Fault]:
    return check_against(PolicySet(policies, "0"), model)


def test_rerouted_experts_of_all_policies_unite_and_audit_counts_while_off_does_not() -> None:
    (fault,) = faults(
        topology(),
        policy("a", {0, 1, 2, 3, 4, 5, 6}),
        policy("b", {6, 7, 8, 9, 10, 11, 12}, mode=Mode.AUDIT),
        policy("c", {13, 14, 15}, mode=Mode.OFF),
    )

    assert "layer 3 chooses 4 of 16 experts" in fault.message
    assert "masks of a/r, b/r together only 3 are left" in fault.message
    assert fault.location == HERE


def test_rules_of_one_policy_unite_too() -> None:
    rules = (policy("a", set(range(7))).rules[0], policy("a", set(range(7, 13))).rules[0])
    both = Policy("a", HERE, Mode.ENFORCE, experts={}, rules=rules)

    (fault,) = faults(topology(), both)

    assert "only 3 are left" in fault.message


@pytest.mark.parametrize("method", ["drop", "drop_renorm"])
def test_a_dropped_expert_keeps_its_place_so_all_may_be_dropped(method: str) -> None:
    assert faults(topology(), policy("a", set(range(16)), method)) == []
    assert faults(topology(), policy("a", set(range(12))), policy("b", set(range(16)), method)) == []


@pytest.mark.parametrize(("count", "refused"), [(4, False), (5, True)])
def test_at_most_top_k_experts_are_forced_by_all_policies_together(count: int, refused: bool) -> None:
    found = faults(
        topology(),
        policy("a", {0, 1, 2}, "force"),
        policy("b", set(range(2, count)), "force", mode=Mode.AUDIT),
    )

    assert bool(found) is refused
    if refused:
        (fault,) = found
        assert "layer 3 chooses 4 experts" in fault.message
        assert "but a/r, b/r together force 5 in; force at most 4" in fault.message


def test_a_forced_expert_counts_even_where_another_mask_may_take_it_out() -> None:
    found = faults(topology(), policy("a", {0, 1, 2, 3, 4}, "force"), policy("b", {4}))

    assert [fault.message.split(" together")[0][-3:] for fault in found] == ["a/r"]


@pytest.mark.parametrize("method", list(MaskMethod))
def test_a_layer_that_a_table_routes_takes_no_mask(method: str) -> None:
    (fault,) = faults(topology(Router("sqrtsoftplus", kind="hash")), policy("a", {1}, method))

    assert "layer 3 is routed by a table from token ids to experts" in fault.message
    assert "a/r would mask it" in fault.message


def test_a_zero_expert_cannot_be_named_and_is_always_live() -> None:
    longcat = topology(
        Router("softmax", renormalize=False, has_bias=True, num_zero_experts=4), num_experts=12
    )

    (fault,) = faults(longcat, policy("a", {12}))
    assert "names expert 12 of layer 3, which is one of its 4 zero experts" in fault.message
    assert "routed experts are 0-11" in fault.message
    assert faults(longcat, policy("a", set(range(12)))) == []


def test_an_id_behind_the_routed_experts_is_told_that_shared_ones_have_none() -> None:
    (fault,) = faults(topology(), policy("a", {16}))

    assert fault.location == ("p.yaml", 5, 9)
    assert "has experts 0-15; shared experts are not routed" in fault.message


def test_a_dense_layer_has_nothing_to_mask() -> None:
    (fault,) = faults(topology(), policy("a", {1}, layer=0))

    assert (
        "names layer 0, but the MoE layers of this model are 3; a dense layer has no" in fault.message
    )


def test_sparsemixer_needs_an_expert_for_each_of_its_two_passes() -> None:
    phi = topology(Router(renormalize=False, kind="sparsemixer"), top_k=2)

    assert faults(phi, policy("a", set(range(14)))) == []
    (fault,) = faults(phi, policy("a", set(range(15))))
    assert "only 1 are left" in fault.message


def test_top_1_is_left_with_one_expert_at_least() -> None:
    llama4 = topology(Router("sigmoid", renormalize=False), top_k=1)

    assert faults(llama4, policy("a", set(range(15)))) == []
    (fault,) = faults(llama4, policy("a", set(range(16))))
    assert "only 0 are left" in fault.message


def test_a_group_scored_by_its_two_best_is_not_left_with_one() -> None:
    (fault,) = faults(
        topology(DEEPSEEK_V3), policy("a", {4, 5}), policy("b", {6}), policy("elsewhere", {15})
    )

    assert "masks of a/r, b/r together only 1 is left in group 1 (experts 4-7)" in fault.message


def test_a_group_scored_by_its_best_may_be_left_with_one_if_any_choice_of_groups_holds_k() -> None:
    assert faults(topology(DEEPSEEK_V2), policy("a", {4, 5, 6})) == []
    assert faults(topology(DEEPSEEK_V2), policy("a", {4, 5, 6, 12})) == []
    (fault,) = faults(topology(DEEPSEEK_V2), policy("a", {4, 5, 6}), policy("b", {12, 13}))
    assert "chooses 4 experts from 2 of its 4 groups" in fault.message
    assert (
        "masks of a/r, b/r together only 3 are left in groups 1, 3 (experts 4-7, 12-15)"
        in fault.message
    )


@pytest.mark.parametrize("router", [DEEPSEEK_V2, DEEPSEEK_V3])
def test_a_group_may_be_masked_as_a_whole_while_others_hold_enough(router: Router) -> None:
    assert faults(topology(router), policy("a", set(range(4, 8)))) == []
    assert faults(topology(router), policy("a", set(range(4, 16)))) == []


@given(
    st.sets(st.integers(0, 15)),
    st.integers(1, 4),
    st.integers(1, 8),
    st.booleans(),
)
def test_grouped_masks_pass_exactly_where_every_choice_of_groups_serves(
    masked: set[int], topk_groups: int, top_k: int, has_bias: bool
) -> None:
    if top_k > 4 * topk_groups:
        return
    router = Router("sigmoid", num_groups=4, topk_groups=topk_groups, has_bias=has_bias)

    found = faults(topology(router, top_k=top_k), policy("a", masked)) if masked else []

    live = [len(set(range(4 * g, 4 * g + 4)) - masked) for g in range(4)]
    there = [g for g in range(4) if live[g]]
    choices = itertools.combinations(there, min(topk_groups, len(there)))
    serves = all(sum(live[g] for g in choice) >= top_k for choice in choices)
    assert (not found) is (serves and not (has_bias and 1 in live))


def test_every_kind_of_refusal_of_a_layer_comes_out_in_one_run() -> None:
    found = faults(topology(), policy("a", set(range(13))), policy("b", set(range(5)), "force"))

    assert ["force at most" in fault.message for fault in found].count(True) == 1
    assert len(found) == 2


def test_a_profile_of_another_model_is_refused_where_it_is_named() -> None:
    other = ModelRequirement(Location("m.json", 2, 2), "Y", layers=1, experts=8, top_k=4)
    profile = Profile(Location("m.json"), Location("p.yaml", 6, 12), other)

    found = faults(topology(), Policy("a", HERE, profile=profile))

    assert {fault.location for fault in found} == {("p.yaml", 6, 12)}
    assert [fault.message.split(", but")[0] for fault in found] == [
        "the profile m.json of policy 'a' is for a model with architecture: Y",
        "the profile m.json of policy 'a' is for a model with experts: 8",
    ]


def test_masks_at_the_places_of_their_rules_in_a_file() -> None:
    text = (
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
        "  experts: {f: [{layer: 3, experts: [0-12]}]}\n"
        "  rules:\n    - {name: r, when: always, then: {mask: {experts: f}}}\n"
    )

    (fault,) = check_against(parse_policies(text, "p.yaml"), topology())

    assert fault.location == ("p.yaml", 7, 38)


def test_ranges() -> None:
    assert ranges([0, 2, 3, 4, 8]) == "0, 2-4, 8"
    assert ranges([]) == "none"


IN_KERNEL = Router(is_in_kernel=True)


def test_a_router_inside_a_kernel_can_be_rerouted() -> None:
    assert not faults(topology(IN_KERNEL), policy("a", {0, 1}), policy("b", {1, 2}))


@pytest.mark.parametrize("method", ["drop", "drop_renorm", "force"])
def test_a_router_inside_a_kernel_can_do_nothing_else(
    method: Method, support_record: SupportRecord
) -> None:
    (fault,) = faults(topology(IN_KERNEL), policy("a", {0, 1}), policy("b", {2}, method))

    assert "layer 3 is routed inside its kernel" in fault.message
    assert f"but b/r would mask it by {method}; use method: reroute" in fault.message
    assert "a/r" not in fault.message
    assert fault.location == HERE
    reason = fault.message.partition(" is ")[2].partition(", but")[0]
    for mode in MODES:
        support_record(IN_A_KERNEL, method, mode=mode, refused=f"its layers are {reason}")


def test_a_router_inside_a_kernel_needs_enough_live_experts_as_any_does() -> None:
    (fault,) = faults(topology(IN_KERNEL), policy("a", set(range(13))))

    assert "only 3 are left" in fault.message
