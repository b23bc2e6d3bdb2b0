"""`moe-guard discover` and `calibrate`, as an operator calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app
from guard.policy import load_policies
from guard.trace.format import TraceHeader
from guard.trace.writer import TraceWriter
from tests.support.causal_check import FAILED_CHECK
from tests.support.planted_trace import Planted

PLANTED = Planted(layers=4, experts=16, planted=3, pairs=120, tokens=30, effect=2.0)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr.replace("\n", " ")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "planted.moetrace"
    with TraceWriter(path, TraceHeader("planted", PLANTED.topology)) as writer:
        for number, request in enumerate(PLANTED.requests(), 1):
            object.__setattr__(request, "request_id", f"{number}")
            writer.write(request)
    return path


def test_the_report_names_the_experts_and_what_chance_would_show(trace: Path, tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    code, text, _ = run("discover", trace, "--target", "target", "--out", written)
    assert code == 0
    assert text.startswith("3 of 64 experts meet all demands.")
    for layer, expert in PLANTED.planted_experts:
        assert f"L{layer}/E{expert}" in text
    assert "labels shuffled within pairs, 20 times" in text
    assert "do not use one" in text
    report = json.loads(written.read_text())
    assert {(one["layer"], one["expert"]) for one in report["experts"]} == {*PLANTED.planted_experts}
    assert report["data"].keys() == {"planted.moetrace"}
    assert len(report["effects"]["rate"]) == 64


def test_the_same_as_json(trace: Path) -> None:
    code, text, _ = run("discover", trace, "--target", "target", "--format", "json")
    assert code == 0
    assert json.loads(text)["prompts"]["pairs"] == 120


def test_no_signal_is_said_first_and_is_no_error(tmp_path: Path) -> None:
    nothing = Planted(layers=4, experts=16, planted=0, pairs=40, tokens=30)
    path = tmp_path / "nothing.moetrace"
    with TraceWriter(path, TraceHeader("planted", nothing.topology)) as writer:
        for request in nothing.requests():
            writer.write(request)
    code, text, _ = run("discover", path, "--target", "target")
    assert code == 0
    assert text.startswith("No signal: of 64 experts none meets all demands")


def test_a_label_that_is_not_there_is_refused(trace: Path) -> None:
    code, _, error = run("discover", trace, "--target", "targt")
    assert code == 1
    assert "no prompt has label 'targt'; did you mean 'target'?" in error


def test_calibrated_thresholds_are_what_a_policy_with_a_budget_takes(
    trace: Path, tmp_path: Path
) -> None:
    entries = [{"layer": layer, "experts": [expert]} for layer, expert in PLANTED.planted_experts]
    profile, conditions = tmp_path / "profile.json", tmp_path / "conditions.yaml"
    profile.write_text(
        json.dumps(
            {
                "apiVersion": "moe-guard/v1",
                "kind": "Profile",
                "model": {"architecture": "PlantedForCausalLM"},
                "sets": {"planted": entries},
            }
        )
    )
    conditions.write_text("- {phase: output, when: {rate: {experts: planted, over: 16}}}\n")
    arguments = ("--profile", profile, "--conditions", conditions, "--budget", 0.05)
    code, text, error = run(
        "calibrate", trace, *arguments, "--target", "target", "--out", tmp_path / "new.json"
    )
    assert code == 0, error
    assert text
    (tmp_path / "policy.yaml").write_text(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: planted}\nspec:\n"
        "  profile: new.json\n  experts: {planted: [{set: planted}]}\n"
        "  rules: [{name: r, match: {phase: output}, "
        "when: {rate: {experts: planted, over: 16, budget: 0.05}}}]\n"
    )
    written = json.loads((tmp_path / "new.json").read_text())
    [budget] = written["thresholds"][0]["budgets"]
    [policy] = load_policies(tmp_path / "policy.yaml").policies
    [condition] = list(policy.rules[0].conditions())
    assert condition.threshold == budget["above"]
    calibration = written["provenance"]["calibration"]
    assert calibration["traces"].keys() == {"planted.moetrace"}
    assert calibration["conditions"][0]["budgets"][0]["falsePositives"]["total"] == 60


def asked(number: int) -> dict[str, object]:
    """Every other one as a chat."""
    text = f"question {number % 7}"
    return {"messages": [{"role": "user", "content": text}]} if number % 2 else {"prompt": text}


def test_words_that_say_nothing_are_worth_nothing_beside_the_routing(
    trace: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(asked(n)) + "\n" for n in range(240)))
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "apiVersion": "moe-guard/v1",
                "kind": "Profile",
                "model": {"architecture": "PlantedForCausalLM"},
                "sets": {
                    "planted": [
                        {"layer": layer, "experts": [expert]}
                        for layer, expert in PLANTED.planted_experts
                    ]
                },
                "thresholds": [
                    {
                        "phase": "output",
                        "when": {"rate": {"experts": "planted", "over": 16}},
                        "budgets": [{"budget": 0.5, "above": 0.1}],
                    }
                ],
            }
        )
    )
    report = tmp_path / "report.json"
    code, text, error = run(
        *("calibrate", trace, "--profile", profile, "--prompts", prompts, "--target", "target"),
        *("--budget", 0.05, "--sequential", "planted", "--report", report),
    )
    assert code == 0, error
    assert text
    found = json.loads(report.read_text())
    assert len(found["text"]["budgets"]) == 1
    assert [one["test"] for one in found["sequential"]] == ["SPRT", "CUSUM"]
    code, _, error = run("report", report, "--out", tmp_path / "report.html")
    assert code == 0, error
    assert (tmp_path / "report.html").read_text().count("<svg") == 1


def test_a_set_that_the_profile_does_not_have_is_refused(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "apiVersion": "moe-guard/v1",
                "kind": "Profile",
                "model": {"architecture": "PlantedForCausalLM"},
                "sets": {"planted": [{"layer": 0, "experts": [1]}]},
                "thresholds": [
                    {
                        "phase": "output",
                        "when": {"rate": {"experts": "planted", "over": 16}},
                        "budgets": [{"budget": 0.5, "above": 0.1}],
                    }
                ],
            }
        )
    )
    arguments = ("--profile", profile, "--target", "target", "--budget", 0.05)
    code, _, error = run("calibrate", trace, *arguments, "--sequential", "plantd")
    assert code == 1
    assert "has no set 'plantd'; did you mean 'planted'?" in error


def test_what_cannot_be_calibrated_is_refused(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text("{}")
    code, _, error = run("calibrate", trace, "--profile", profile)
    assert code == 1
    assert "there is no condition to calibrate" in error


def test_a_profile_is_made_of_what_was_found_and_policies_can_name_it(
    trace: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    arguments = ("--target", "target", "--profile", profile, "--licence", "CC0-1.0")
    code, _, error = run("discover", trace, *arguments, "--set", "planted")
    assert code == 0, error
    written = json.loads(profile.read_text())
    named = {(one["layer"], e) for one in written["sets"]["planted"] for e in one["experts"]}
    assert named == {*PLANTED.planted_experts}
    assert written["licence"] == "CC0-1.0"
    assert written["data"].keys() == {"planted.moetrace"}
    statistics = written["statistics"]["planted"]
    assert statistics["pairs"] == 120
    assert {(one["layer"], one["expert"]) for one in statistics["experts"]} == named
    assert all(
        one["interval"][0] <= one["effect"] <= one["interval"][1] for one in statistics["experts"]
    )
    for rates in written["baselines"]["rates"].values():
        assert sum(rates) == pytest.approx(PLANTED.topology.max_top_k, abs=1e-3)
    (tmp_path / "policy.yaml").write_text(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: planted}\nspec:\n"
        "  profile: profile.json\n  experts: {planted: [{set: planted}]}\n  rules:\n"
        "    - {name: r, when: {suppressed: {experts: planted, over: 16, above: 0.5}}}\n"
        "    - {name: s, when: {probe: {name: planted, over: 16, above: 0.9}}}\n"
    )
    [policy] = load_policies(tmp_path / "policy.yaml").policies
    assert {tuple(expert) for expert in policy.experts["planted"].weights} == named


def test_what_a_profile_says_of_other_sets_stays(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    run("discover", trace, "--target", "target", "--profile", profile, "--set", "first")
    first = json.loads(profile.read_text())
    first["causal"] = dict.fromkeys(("first",), FAILED_CHECK)
    first["baselines"]["tokens"] = 9
    first["neverMask"] = [{"layer": 0, "experts": [1], "reason": "by hand"}]
    profile.write_text(json.dumps(first))
    code, _, error = run(
        "discover", trace, "--target", "target", "--profile", profile, "--set", "second"
    )
    assert code == 0, error
    both = json.loads(profile.read_text())
    assert both["baselines"] == {"tokens": 9, "rates": first["baselines"]["rates"]}
    assert both["sets"]["first"] == both["sets"]["second"] == first["sets"]["first"]
    assert both["causal"] == first["causal"]
    assert both["neverMask"] == first["neverMask"]
    run("discover", trace, "--target", "target", "--profile", profile, "--set", "first")
    assert "causal" not in json.loads(profile.read_text()), "a set found anew is not the one checked"


def test_a_profile_of_another_model_is_refused_and_left_as_it_is(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    other = {"apiVersion": "moe-guard/v1", "kind": "Profile", "model": {"architecture": "Other"}}
    profile.write_text(json.dumps(other))
    code, _, error = run("discover", trace, "--target", "target", "--profile", profile)
    assert code == 1
    assert "the profile is of another model: its architecture is 'Other'" in error
    assert json.loads(profile.read_text()) == other


def test_thresholds_are_shown_on_other_prompts_and_other_conditions_keep_theirs(
    trace: Path, tmp_path: Path
) -> None:
    profile, fresh = tmp_path / "profile.json", tmp_path / "fresh.moetrace"
    harder = Planted(layers=4, experts=16, planted=3, pairs=30, tokens=30, effect=2.0, seed=5)
    with TraceWriter(fresh, TraceHeader("planted", harder.topology)) as writer:
        for request in harder.requests():
            writer.write(request)
    run("discover", trace, "--target", "target", "--profile", profile, "--set", "planted")
    for number, words in enumerate(("over: 16", "over: 8", "over: 16")):
        conditions = tmp_path / f"{number}.yaml"
        conditions.write_text(f"- {{phase: output, when: {{rate: {{experts: planted, {words}}}}}}}\n")
        arguments = ("--profile", profile, "--out", profile, "--conditions", conditions)
        code, _, error = run(
            "calibrate", trace, *arguments, "--held-out-trace", fresh, "--budget", 0.05
        )
        assert code == 0, error
    written = json.loads(profile.read_text())
    assert sorted(one["when"]["rate"]["over"] for one in written["thresholds"]) == [8, 16]
    calibration = written["provenance"]["calibration"]
    assert calibration["traces"].keys() == {"planted.moetrace", "fresh.moetrace"}
    assert len(calibration["conditions"]) == 2
    for one in calibration["conditions"]:
        assert one["budgets"][0]["falsePositives"]["total"] == 30
