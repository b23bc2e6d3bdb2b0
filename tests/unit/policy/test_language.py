"""The parts of the language that take something from elsewhere: profiles, set files, matches."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from guard.policy import Fault, PolicyError, PolicySet, load_policies
from guard.policy.model import (
    ALL_REQUESTS,
    Comparison,
    Condition,
    Expert,
    Expression,
    Phase,
    Policy,
    Reduce,
    Together,
    TogetherIn,
)
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology

PROFILE: dict[str, Any] = {
    "apiVersion": "moe-guard/v1",
    "kind": "Profile",
    "model": {"architecture": "A", "layers": 2, "experts": 4, "topK": 2},
    "provenance": {"command": "moe-guard calibrate", "anything": [1, 2]},
    "sets": {
        "chemistry": [{"layer": 3, "experts": [0, "2-3"]}],
        "weighted": [{"layers": "3-4", "weights": {"1": 0.5}}],
    },
    "baselines": {"tokens": 1000, "rates": {"3": [0.9, 0.6, 0.49, 0.01], "4": [0.5, 0.5, 0.5, 0.5]}},
    "probes": {
        "harmful": {"bias": -1, "weights": [{"layer": 3, "weights": {"0": 2, "3": -0.5}}]},
        "other": {"weights": [{"layer": 4, "weights": {"0": 1}}]},
    },
    "thresholds": [
        {
            "phase": "output",
            "when": {"rate": {"experts": "chemistry", "over": 64, "minTokens": 16}},
            "budgets": [{"budget": 0.01, "above": 0.4}, {"budget": 0.1, "above": 0.3}],
        },
        {
            "when": {"count": {"experts": "chemistry", "over": 8}},
            "budgets": [{"budget": 0.05, "atLeast": 5}],
        },
        {"when": {"entropy": {"over": 32}}, "budgets": [{"budget": 0.05, "below": 1.5}]},
    ],
}

BUDGET = {"budget": 0.1, "above": 1}
FLAGGED = "  experts: {flagged: [{layer: 3, experts: [0, 2, 3]}]}\n"


def document(spec: str, name: str = "p") -> str:
    return f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n{spec}"


def load(folder: Path, *documents: str, profile: object = PROFILE, **files: str) -> PolicySet:
    (folder / "m.json").write_text(json.dumps(profile, indent=1))
    (folder / "p.yaml").write_text("---\n".join(documents))
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return load_policies(folder)


def policy(folder: Path, spec: str, profile: object = PROFILE) -> Policy:
    return load(folder, document("  profile: m.json\n" + spec), profile=profile).policies[0]


def condition(folder: Path, when: str, match: str = "{}", profile: object = PROFILE) -> Condition:
    spec = f"{FLAGGED}  rules:\n    - {{name: r, match: {match}, when: {when}}}\n"
    expression: Expression = policy(folder, spec, profile).rules[0].when
    assert isinstance(expression, Condition)
    return expression


def faults(folder: Path, *documents: str, profile: object = PROFILE, **files: str) -> tuple[Fault, ...]:
    with pytest.raises(PolicyError) as caught:
        load(folder, *documents, profile=profile, **files)
    return caught.value.faults


def ids(condition: Condition) -> set[Expert]:
    assert condition.experts is not None
    return set(condition.experts.weights)


def test_a_set_of_a_profile_is_its_entries_at_the_line_that_names_it(tmp_path: Path) -> None:
    spec = "  experts:\n    f:\n      - {set: chemistry}\n      - {layer: 4, experts: 1}\n  rules: []\n"
    built = policy(tmp_path, spec).experts["f"]

    assert set(built.weights) == {Expert(3, 0), Expert(3, 2), Expert(3, 3), Expert(4, 1)}
    assert [entry.location.line for entry in built.entries] == [8, 9]


def test_an_entry_may_name_a_profile_of_its_own(tmp_path: Path) -> None:
    spec = "  experts: {f: [{profile: m.json, set: weighted}]}\n  rules: []\n"
    (loaded,) = load(tmp_path, document(spec)).policies

    assert loaded.experts["f"].weights == {Expert(3, 1): 0.5, Expert(4, 1): 0.5}
    assert loaded.profile is None
    assert [p.location.file for p in loaded.profiles] == [str(tmp_path / "m.json")]


def test_unequal_weights_between_a_profile_and_the_policy_are_a_fault(tmp_path: Path) -> None:
    spec = "  profile: m.json\n  experts: {f: [{set: weighted}, {layer: 4, experts: 1}]}\n  rules: []\n"
    (fault,) = faults(tmp_path, document(spec))

    assert "expert 1 of layer 4 has weight 1 here, but 0.5 above" in fault.message


def test_an_unknown_set_of_a_profile_has_the_nearest_name(tmp_path: Path) -> None:
    spec = "  profile: m.json\n  experts: {f: [{set: chemstry}]}\n  rules: []\n"
    (fault,) = faults(tmp_path, document(spec))

    assert fault.location[1:] == (6, 23)
    assert "has no set 'chemstry'; did you mean 'chemistry'?" in fault.message


SETS = """\
apiVersion: moe-guard/v1
kind: ExpertSets
spec:
  experts:
    flagged: [{layer: 3, experts: [0, 1]}]
"""
BY_FILE = document(
    "  rules:\n    - name: r\n      when: {count: {experts: lib/flagged, above: 0}}\n"
    "      then: {mask: {experts: lib/flagged}}\n"
)


def test_policies_name_the_sets_of_a_file_by_its_name(tmp_path: Path) -> None:
    (loaded,) = load(tmp_path, BY_FILE, lib=SETS).policies

    assert list(loaded.experts) == ["lib/flagged"]
    assert set(loaded.experts["lib/flagged"].weights) == {Expert(3, 0), Expert(3, 1)}


def test_the_set_of_another_file_is_in_the_revision(tmp_path: Path) -> None:
    before = load(tmp_path, BY_FILE, lib=SETS).revision

    assert load(tmp_path, BY_FILE, lib=SETS.replace("[0, 1]", "[0, 2]")).revision != before


def test_an_unknown_set_of_a_file_has_the_nearest_name(tmp_path: Path) -> None:
    found = faults(tmp_path, BY_FILE.replace("lib/flagged, above", "lib/flaged, above"), lib=SETS)

    assert [fault.location[1:] for fault in found] == [(7, 31)]
    assert "there is no set 'lib/flaged'; did you mean 'lib/flagged'?" in found[0].message


def test_of_two_files_of_one_name_the_one_beside_the_policy_is_meant(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lib.yaml").write_text(SETS.replace("[0, 1]", "[2]"))
    (loaded,) = load(tmp_path, BY_FILE, lib=SETS).policies
    assert Expert(3, 0) in loaded.experts["lib/flagged"].weights

    (tmp_path / "third").mkdir()
    (tmp_path / "lib.yaml").rename(tmp_path / "third" / "lib.yaml")
    with pytest.raises(PolicyError, match=r"the set 'lib/flagged' is in .*; rename one of the files"):
        load_policies(tmp_path)


def test_suites_beside_policies_are_no_policies(tmp_path: Path) -> None:
    suite = "apiVersion: moe-guard/v1\nkind: PolicyTest\ncases: [anything]\n"

    assert len(load(tmp_path, document("  rules: []\n"), suite=suite).policies) == 1


def test_coactivation_counts_tokens_with_enough_members_or_layers(tmp_path: Path) -> None:
    members = condition(tmp_path, "{coactivation: {experts: flagged, members: 2, over: 9, above: 0}}")
    layers = condition(tmp_path, "{coactivation: {experts: flagged, layers: 3, over: 9, below: 1}}")

    assert members.together == Together(2, TogetherIn.MEMBERS)
    assert layers.together == Together(3, TogetherIn.LAYERS)
    assert (members.min_tokens, layers.min_tokens) == (1, 9)


def test_dormant_experts_are_those_of_a_low_baseline(tmp_path: Path) -> None:
    every = condition(tmp_path, "{dormant: {baselineBelow: 0.5, over: 4, above: 0}}")
    some = condition(tmp_path, "{dormant: {baselineBelow: 1, experts: flagged, above: 0}}")

    assert ids(every) == {Expert(3, 2), Expert(3, 3)}
    assert ids(some) == {Expert(3, 0), Expert(3, 2), Expert(3, 3)}
    assert every.min_tokens == 1


def test_a_limit_below_every_baseline_says_the_lowest(tmp_path: Path) -> None:
    spec = "  profile: m.json\n  rules: [{name: r, when: {dormant: {baselineBelow: 0.01, above: 0}}}]\n"
    (fault,) = faults(tmp_path, document(spec))

    assert (
        "no expert has a baseline rate below 0.01; the lowest in the profile is 0.01" in fault.message
    )


def test_conditions_that_compare_have_the_baselines(tmp_path: Path) -> None:
    suppressed = condition(tmp_path, "{suppressed: {experts: flagged, above: 1}}")
    divergence = condition(tmp_path, "{divergence: {reduce: mean, above: 0.2}}")

    for one in (suppressed, divergence):
        assert one.baselines is not None
        assert one.baselines.rate(Expert(3, 1)) == 0.6
    assert divergence.reduce is Reduce.MEAN


def test_an_expert_without_a_baseline_is_a_fault_of_the_condition(tmp_path: Path) -> None:
    spec = (
        "  profile: m.json\n  experts: {f: [{layer: 5, experts: 0}]}\n"
        "  rules: [{name: r, when: {suppressed: {experts: f, above: 1}}}]\n"
    )
    (fault,) = faults(tmp_path, document(spec))

    assert fault.location[1:] == (7, 50)
    assert "the profile has no baseline of expert 0 of layer 5" in fault.message


def test_a_probe_brings_its_weights_and_bias(tmp_path: Path) -> None:
    probe = condition(tmp_path, "{probe: {name: harmful, over: prompt, above: 0.9}}")

    assert probe.experts is not None
    assert (dict(probe.experts.weights), probe.bias) == ({Expert(3, 0): 2.0, Expert(3, 3): -0.5}, -1.0)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("{above: 0.5}", "has several probes; name: harmful or other"),
        ("{name: harmfull, above: 0.5}", "has no probe 'harmfull'; did you mean 'harmful'?"),
    ],
    ids=["several", "unknown"],
)
def test_a_probe_that_is_not_meant_clearly_is_a_fault(tmp_path: Path, probe: str, message: str) -> None:
    spec = f"  profile: m.json\n  rules: [{{name: r, when: {{probe: {probe}}}}}]\n"
    (fault,) = faults(tmp_path, document(spec))

    assert message in fault.message


def test_a_budget_takes_threshold_and_direction_from_the_same_condition(tmp_path: Path) -> None:
    rate = condition(
        tmp_path,
        "{rate: {experts: flagged, over: 64, minTokens: 16, budget: 0.01}}",
        match="{phase: output}",
    )
    assert (rate.comparison, rate.threshold, rate.budget) == (Comparison.ABOVE, 0.4, 0.01)

    # minTokens by default: 1, because it counts upwards, as in the profile.
    count = condition(tmp_path, "{count: {experts: flagged, over: 8, budget: 0.05}}")
    assert (count.comparison, count.threshold, count.min_tokens) == (Comparison.AT_LEAST, 5.0, 1)

    entropy = condition(tmp_path, "{entropy: {over: 32, budget: 0.05}}")
    assert (entropy.comparison, entropy.threshold) == (Comparison.BELOW, 1.5)


@pytest.mark.parametrize(
    ("when", "match", "message"),
    [
        ("over: 64, minTokens: 16, budget: 0.02", "output", "calibrated to 0.01 or 0.1 only"),
        ("over: 64, minTokens: 16, budget: 0.01", "any", "has no threshold for this condition"),
        ("over: 64, budget: 0.01", "output", "has no threshold for this condition"),
        ("over: 32, minTokens: 16, budget: 0.01", "output", "has no threshold for this condition"),
    ],
    ids=["budget", "phase", "minTokens", "window"],
)
def test_a_budget_that_was_not_calibrated_is_a_fault(
    tmp_path: Path, when: str, match: str, message: str
) -> None:
    spec = (
        f"  profile: m.json\n{FLAGGED}  rules:\n    - name: r\n      match: {{phase: {match}}}\n"
        f"      when: {{rate: {{experts: flagged, {when}}}}}\n"
    )
    (fault,) = faults(tmp_path, document(spec))

    assert fault.location.line == 10
    assert message in fault.message


def test_matches_and_exceptions_are_read(tmp_path: Path) -> None:
    spec = """\
  rules:
    - name: r
      match: {phase: output, labels: {tenant: [a, b], tier: gold}, loraAdapters: x, sample: 0.1}
      when: always
    - {name: s, when: always}
  exceptions:
    - {name: e, match: {labels: {tenant: red-team}}, rules: [s], until: 2027-03-31}
    - {name: all, match: {loraAdapters: [x, y]}}
"""
    loaded = policy(tmp_path, spec)
    match, (first, every) = loaded.rules[0].match, loaded.exceptions

    assert (match.labels, match.sample) == (
        {"tenant": frozenset({"a", "b"}), "tier": frozenset({"gold"})},
        0.1,
    )
    assert match.lora_adapters == frozenset({"x"})
    assert (loaded.rules[0].phase, loaded.rules[1].match) == (Phase.OUTPUT, ALL_REQUESTS)
    assert (first.rules, first.until) == (frozenset({"s"}), date(2027, 3, 31))
    assert (first.covers("s"), first.covers("r"), every.covers("r")) == (True, False, True)
    assert [first.is_expired(date(2027, 3, day)) for day in (31,)] == [False]
    assert first.is_expired(date(2027, 4, 1))


@pytest.mark.parametrize(
    ("exception", "message"),
    [
        ("{name: e, match: {}}", "an exception for every request would switch the rules off"),
        ("{name: e}", "the key 'match' is missing"),
        ("{name: e, match: {phase: output}}", "an exception is for whole requests"),
        ("{name: e, match: {labels: {a: b}}, rules: [rr]}", "there is no rule 'rr'; did you mean 'r'?"),
        ("{name: e, match: {labels: {a: b}}, until: 2027-13-01}", "expected a day such as 2027-03-31"),
    ],
    ids=["everybody", "nobody", "phase", "rule", "day"],
)
def test_an_exception_says_for_whom_and_from_what(tmp_path: Path, exception: str, message: str) -> None:
    spec = f"  rules: [{{name: r, when: always}}]\n  exceptions: [{exception}]\n"
    found = faults(tmp_path, document(spec))

    assert [fault for fault in found if message in fault.message], found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baselines": {"rates": {"3": [1.0, 1.0]}}}, "2 rates, but the model has 4 experts a layer"),
        ({"baselines": {"rates": {"3": [0.1, 0, 0, 0]}}}, "the rates add up to 0.1"),
        ({"baselines": {"rates": {"x": [0.5] * 4}}}, "expected a key that is a whole number"),
        (
            {
                "thresholds": [
                    {"when": {"mass": {"experts": "x"}}, "budgets": [{"budget": 0.1, "above": 1}]}
                ]
            },
            "the profile has no set 'x'; it has chemistry and weighted",
        ),
        (
            {
                "thresholds": [
                    {
                        "when": {"entropy": {}},
                        "budgets": [{"budget": 0.1, "above": 1}, {"budget": 0.2, "below": 1}],
                    }
                ]
            },
            "point the same way",
        ),
        (
            {"thresholds": [{"when": {"entropy": {}}, "budgets": [BUDGET]}] * 2},
            "thresholds[0] is for the same condition",
        ),
        ({"probes": {"p": {"weights": [{"layer": 3, "weights": {"0": 1}}] * 2}}}, "is listed twice"),
    ],
    ids=["experts", "sum", "layer", "set", "direction", "twice", "probe"],
)
def test_a_malformed_profile_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    found = faults(tmp_path, document("  profile: m.json\n  rules: []\n"), profile=PROFILE | change)

    assert [f for f in found if message in f.message and f.location.file.endswith("m.json")], found


def test_the_baselines_of_a_profile_are_of_the_served_model(tmp_path: Path) -> None:
    loaded = load(tmp_path, document("  profile: m.json\n  rules: []\n"))

    compile_policies(loaded, Topology("A", (MoELayer(3, 4, 2), MoELayer(4, 4, 2))))
    with pytest.raises(PolicyError, match=r"baselines of 4 experts in layer 3, .* model has 0"):
        compile_policies(loaded, Topology("A", (MoELayer(4, 4, 2), MoELayer(5, 4, 2))))
