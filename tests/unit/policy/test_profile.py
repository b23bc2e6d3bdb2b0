"""A profile beside a policy: what it may say, where its faults are, and that its list is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guard.policy import Fault, PolicyError, PolicySet, load_policies
from guard.policy.fault import Location
from guard.policy.model import MaskMethod, Profile
from guard.policy.profile import load_profile
from guard.policy.texts import Text
from tests.support.causal_check import FAILED_CHECK

PROFILE: dict[str, Any] = {
    "apiVersion": "moe-guard/v1",
    "kind": "Profile",
    "model": {"architecture": "Qwen3MoeForCausalLM", "layers": 48, "experts": 128, "topK": 8},
    "neverMask": [{"layer": 12, "experts": [85, "90-95"], "reason": "super expert"}],
}


def policy(
    experts: str = "{layer: 12, experts: [85]}",
    *,
    name: str = "p",
    mode: str = "audit",
    method: str = "reroute",
    profile: str | None = "profiles/m.json",
) -> str:
    named = f"  profile: {profile}\n" if profile else ""
    return (
        f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n"
        f"  mode: {mode}\n{named}"
        f"  experts: {{flagged: [{experts}]}}\n"
        "  rules:\n"
        f"    - {{name: r, when: always, then: {{mask: {{experts: flagged, method: {method}}}}}}}\n"
    )


def load(folder: Path, *policies: str, profile: object = PROFILE) -> PolicySet:
    (folder / "profiles").mkdir(exist_ok=True)
    text = profile if isinstance(profile, str) else json.dumps(profile, indent=1)
    (folder / "profiles" / "m.json").write_text(text)
    (folder / "p.yaml").write_text("---\n".join(policies))
    return load_policies(folder)


def faults(folder: Path, *policies: str, profile: object = PROFILE) -> tuple[Fault, ...]:
    with pytest.raises(PolicyError) as caught:
        load(folder, *policies, profile=profile)
    return caught.value.faults


def test_a_profile_is_read_relative_to_the_folder_of_the_policy_that_names_it(tmp_path: Path) -> None:
    (loaded,) = load(tmp_path, policy("{layer: 12, experts: [84]}")).policies

    assert loaded.profile is not None
    assert loaded.profile.location.file == str(tmp_path / "profiles" / "m.json")
    assert (loaded.profile.model.architecture, loaded.profile.model.top_k) == ("Qwen3MoeForCausalLM", 8)
    (entry,) = loaded.profile.never_mask
    assert (entry.layers, entry.experts) == ((12,), (85, 90, 91, 92, 93, 94, 95))


def test_a_profile_may_lie_beside_the_folder_of_policies(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "m.json").write_text(json.dumps(PROFILE))
    (tmp_path / "policies" / "p.yaml").write_text(policy("{layer: 1, experts: 1}", profile="../m.json"))

    assert load_policies(tmp_path / "policies").policies[0].profile is not None


@pytest.mark.parametrize("method", ["reroute", "drop", "drop_renorm"])
def test_a_mask_of_a_listed_expert_is_refused_with_all_who_are_concerned(
    tmp_path: Path, method: str
) -> None:
    (fault,) = faults(tmp_path, policy("{layer: 12, experts: [1, 90-91]}", method=method))

    assert fault.location == (str(tmp_path / "p.yaml"), 9, 38)
    assert "p/r masks L12/E90, L12/E91, which" in fault.message
    assert f"{tmp_path}/profiles/m.json:11:3 " in fault.message
    assert "(super expert)" in fault.message


def test_a_listed_expert_may_be_forced_watched_or_named_in_another_layer(tmp_path: Path) -> None:
    load(
        tmp_path,
        policy(name="forces", method=MaskMethod.FORCE),
        policy(name="elsewhere", experts="{layer: 13, experts: [85]}"),
        policy(name="asleep", mode="off"),
        policy(name="watches").replace(
            "when: always, then: {mask: {experts: flagged, method: reroute}}",
            "when: {count: {experts: flagged, atLeast: 1}}",
        ),
    )


def test_a_profile_of_one_policy_binds_the_masks_of_its_neighbours(tmp_path: Path) -> None:
    found = faults(tmp_path, policy("{layer: 1, experts: 1}"), policy(name="q", profile=None))

    assert [fault.message.split(" masks")[0] for fault in found] == ["q/r"]


def test_policies_that_share_a_profile_read_it_once_and_each_names_it_at_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(text: Text, named_at: Location) -> Profile:
        read.append(text.file)
        return load_profile(text, named_at)

    monkeypatch.setattr("guard.policy.load.load_profile", counted)
    harmless = "{layer: 1, experts: 1}"

    loaded = load(tmp_path, policy(harmless), policy(harmless, name="q"))

    assert read == [str(tmp_path / "profiles" / "m.json")]
    assert [p.profile.named_at.line for p in loaded.policies if p.profile] == [6, 16]


def test_a_profile_of_a_policy_that_is_off_binds_nobody(tmp_path: Path) -> None:
    load(tmp_path, policy(mode="off"), policy(name="q", profile=None))


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ('"neverMask"', '"nevermask"', (10, 2), "unknown key 'nevermask'; did you mean 'neverMask'?"),
        ('"kind": "Profile"', '"kind": "Policy"', (3, 10), "kind: expected Profile"),
        ("moe-guard/v1", "moe-guard/v2", (2, 16), "did you mean 'moe-guard/v1'?"),
        ('"layer": 12', '"layer": "x"', (12, 13), "neverMask[0].layer: expected a whole number"),
        ('"90-95"', '"95-90"', (15, 5), "runs backwards"),
        ('"layer": 12,', "", (11, 3), "exactly one of layer or layers"),
        ('"topK": 8', '"topK": 0', (8, 11), "model.topK: expected at least 1"),
        ('"topK": 8', '"topK": 8,', (9, 2), "not JSON"),
        ('"topK": 8', '"topK": NaN', (0, 0), "NaN, which JSON does not know"),
        ('"topK": 8', '"topK": 8, "experts": 1', (8, 14), "'experts' is already given at line 7"),
        ('"super expert"', "[" * 70 + "]" * 70, (17, 76), "more than 64 deep"),
    ],
)
def test_a_fault_of_a_profile_has_its_place_in_it(
    tmp_path: Path, old: str, new: str, place: tuple[int, int], message: str
) -> None:
    text = json.dumps(PROFILE, indent=1)
    assert old in text

    found = faults(tmp_path, policy("{layer: 1, experts: 1}"), profile=text.replace(old, new, 1))

    assert {fault.location.file for fault in found} == {str(tmp_path / "profiles" / "m.json")}
    assert any(message in f.message and f.location[1:] == place for f in found), found


def test_a_missing_profile_is_a_fault_where_it_is_named(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, policy("{layer: 1, experts: 1}", profile="profiles/other.json"))

    assert fault.location == (str(tmp_path / "p.yaml"), 6, 12)
    assert f"the profile {tmp_path}/profiles/other.json is no file" in fault.message


def test_a_profile_that_is_no_text_is_a_fault_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")

    (fault,) = faults(tmp_path, policy("{layer: 1, experts: 1}", profile="bad.json"))

    assert (fault.location.line, fault.message.rpartition(" is ")[2]) == (
        6,
        "not UTF-8; save it as UTF-8",
    )


REFUSALS = PROFILE | {
    "sets": {"refusals": [{"layer": 3, "experts": [7]}, {"layer": 4, "experts": [1, 2]}]}
}


@pytest.mark.parametrize("method", ["reroute", "drop", "drop_renorm"])
def test_a_protective_set_is_not_masked_by_whatever_name_it_comes(tmp_path: Path, method: str) -> None:
    text = policy("{layer: 4, experts: [1, 9]}", method=method)
    (fault,) = faults(tmp_path, text, profile=REFUSALS | {"protective": {"refusals": {}}})

    assert fault.message.startswith("p/r masks L4/E1, which the profile")
    assert "refusals is protective; an `override` there, which says why, allows it" in fault.message


def test_an_override_that_says_why_allows_it_and_forcing_needs_none(tmp_path: Path) -> None:
    why = {"override": "a red team measures what is left of the refusals"}
    overridden = REFUSALS | {"protective": {"refusals": why}}
    masked = load(tmp_path, policy("{layer: 4, experts: 1}"), profile=overridden)
    assert len(masked.policies) == 1
    forced = policy("{layer: 4, experts: 1}", method="force")
    protected = REFUSALS | {"protective": {"refusals": {}}}
    assert len(load(tmp_path, forced, profile=protected).policies) == 1


@pytest.mark.parametrize(
    ("protective", "message"),
    [
        ({"refusal": {}}, "the profile has no set 'refusal'; did you mean 'refusals'?"),
        ({"refusals": {"override": ""}}, "protective.refusals.override"),
        ({"refusals": {"overide": "x"}}, "did you mean 'override'?"),
    ],
)
def test_a_protective_set_that_is_none_is_refused(
    tmp_path: Path, protective: object, message: str
) -> None:
    (fault,) = faults(
        tmp_path, policy("{layer: 1, experts: 1}"), profile=REFUSALS | {"protective": protective}
    )
    assert message in fault.message


def of_refusals(*, method: str = "reroute") -> str:
    return policy("{set: refusals}", method=method)


@pytest.mark.parametrize("method", ["reroute", "drop", "drop_renorm", "force"])
def test_a_set_that_failed_its_causal_check_is_promoted_to_no_mask(tmp_path: Path, method: str) -> None:
    profile = REFUSALS | {"causal": {"refusals": FAILED_CHECK}}
    (fault,) = faults(tmp_path, of_refusals(method=method), profile=profile)

    assert fault.message.startswith("p/r: the set 'refusals' did not pass its causal check")
    assert "give the check an `override` that says why" in fault.message


@pytest.mark.parametrize(
    "causal", [{}, {"passed": True}, {"override": "the red team wants to see what is left"}]
)
def test_one_that_passed_or_has_an_override_is(tmp_path: Path, causal: dict[str, object]) -> None:
    profile = REFUSALS | ({"causal": {"refusals": FAILED_CHECK | causal}} if causal else {})
    assert len(load(tmp_path, of_refusals(), profile=profile).policies) == 1


def test_the_same_experts_in_a_list_of_ones_own_are_not_that_set(tmp_path: Path) -> None:
    profile = REFUSALS | {"causal": {"refusals": FAILED_CHECK}}
    text = policy("{layer: 3, experts: 7}")
    assert len(load(tmp_path, text, profile=profile).policies) == 1


@pytest.mark.parametrize("key", ["causal", "statistics"])
def test_evidence_of_a_set_that_is_not_there_is_refused(tmp_path: Path, key: str) -> None:
    statistics = {
        **{"target": "a", "reference": "b", "phase": "output", "pairs": 9, "tokens": 90},
        "experts": [],
    }
    evidence = {"refusal": FAILED_CHECK if key == "causal" else statistics}
    (fault,) = faults(tmp_path, of_refusals(), profile=REFUSALS | {key: evidence})
    assert "the profile has no set 'refusal'; did you mean 'refusals'?" in fault.message


def test_the_revision_follows_what_a_profile_says_not_where_it_lies(tmp_path: Path) -> None:
    harmless = policy("{layer: 1, experts: 1}")
    longer = [*PROFILE["neverMask"], {"layers": "3-4", "experts": 7}]
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()

    first = load(here, harmless).revision
    assert load(elsewhere, "\n\n" + harmless).revision == first
    assert load(here, harmless, profile=PROFILE | {"neverMask": longer}).revision != first


@pytest.mark.parametrize("key", ["sets", "neverMask"])
def test_a_short_profile_does_not_stand_for_millions_of_experts(key: str) -> None:
    entry = {"layers": "0-4095", "experts": ["0-65535"] * 1024}
    document = {key: {"s": [entry] * 3} if key == "sets" else [entry] * 3}
    text = json.dumps(PROFILE | {"model": {"architecture": "X"}} | document)
    with pytest.raises(PolicyError) as caught:
        load_profile(Text("m.json", text), Location("p.yaml", 1, 1))
    (fault,) = caught.value.faults
    assert "more than 1048576 experts; take some out" in fault.message
