"""`moe-guard replay`: what it prints, and with what it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app
from guard.trace.format import TraceHeader
from guard.trace.writer import TraceWriter
from tests.unit.offline.test_replay import POLICIES, REQUESTS, TOPOLOGY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and two traces, of 14 requests and of 10."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "policy.yaml").write_text(POLICIES.replace("{mode}", "audit"))
    for name, requests in (("a", REQUESTS[:14]), ("b", REQUESTS[14:])):
        with TraceWriter(folder / f"{name}.moetrace", TraceHeader("some-model", TOPOLOGY)) as writer:
            assert all(writer.write(request) for request in requests)
    return folder


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    policies = folder / "policy.yaml"
    result = CliRunner().invoke(
        app, ["replay", str(folder), "--policies", str(policies), *map(str, arguments)]
    )
    return result.exit_code, result.stdout, result.stderr


def test_a_folder_of_traces_is_counted_by_rule(folder: Path) -> None:
    code, text, _ = run(folder, "--format", "json", "--sweep", "burst/rate=0.2,0.3")
    found = json.loads(text)
    assert code == 0
    assert found["requests"] == 24
    assert found["tokens"] == sum(len(request.routing.topk_ids) for request in REQUESTS)
    assert sum(found["outcomes"].values()) == 24
    rules = {rule["rule"]: rule for rule in found["rules"]}
    assert set(rules) == {"burst", "heavy"}
    (sweep,) = found["sweeps"]
    assert [(point["threshold"], point["is_current"]) for point in sweep["points"]] == [
        (0.2, False),
        (0.3, True),
    ]
    assert sweep["points"][1]["fired"] == rules["burst"]["fired"] > 0
    code, text, _ = run(folder)
    assert f"{rules['burst']['fired']}" in text.split("p/burst")[1]


def test_each_decision_is_a_line(folder: Path) -> None:
    code, text, _ = run(folder, "--format", "jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    assert code == 0
    assert {line["rule"] for line in lines} == {"burst", "heavy"}
    of_burst = next(line for line in lines if line["rule"] == "burst")
    assert of_burst["request_id"].startswith("cmpl-")
    assert (of_burst["phase"], of_burst["mode"], of_burst["action"]) == ("output", "audit", "mask")
    assert [one["condition"] for one in of_burst["evidence"]] == ["rate", "count"]
    assert of_burst["evidence"][0]["value"] > of_burst["evidence"][0]["threshold"] == 0.3


def test_enforcing_a_policy_shows_what_it_would_have_done(folder: Path) -> None:
    _, text, _ = run(folder, "--format", "json", "--enforce", "p")
    assert json.loads(text)["outcomes"]["blocked"] > 0


def test_thresholds_of_a_sweep_are_chosen_where_none_are_given(folder: Path) -> None:
    _, text, _ = run(folder, "--format", "json", "--sweep", "p/heavy/mass")
    (sweep,) = json.loads(text)["sweeps"]
    fired = [point["fired"] for point in sweep["points"]]
    assert len(fired) > 5
    assert fired == sorted(fired, reverse=True)
    assert fired[0] > 10 > 2 > fired[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "brust/rate"), "there is no condition 'brust/rate'; did you mean 'p/burst/rate'?"),
        (("--sweep", "burst/rate=x"), "'x' is no list of numbers such as 0.1,0.2"),
        (("--enforce", "q"), "there is no policy 'q'"),
    ],
    ids=["condition", "thresholds", "policy"],
)
def test_what_cannot_be_done_is_told(folder: Path, arguments: tuple[str, str], message: str) -> None:
    code, _, error = run(folder, *arguments)
    assert code == 1
    assert message in error.replace("\n", " ")


def test_a_torn_trace_is_replayed_with_a_warning(folder: Path, tmp_path: Path) -> None:
    content = (folder / "a.moetrace").read_bytes()
    (tmp_path / "a.moetrace").write_bytes(content[:-5])
    (tmp_path / "policy.yaml").write_text(POLICIES.replace("{mode}", "audit"))
    code, text, error = run(tmp_path, "--format", "json")
    assert (code, json.loads(text)["requests"]) == (0, 13)
    assert "ends within a request" in error


def test_without_gate_weights_rules_that_need_them_are_named(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICIES.replace("{mode}", "audit"))
    header = TraceHeader("some-model", TOPOLOGY, weights=None)
    with TraceWriter(tmp_path / "a.moetrace", header) as writer:
        assert writer.write(REQUESTS[0])
    code, text, error = run(tmp_path, "--format", "json")
    assert code == 0
    assert [rule["rule"] for rule in json.loads(text)["rules"]] == ["burst"]
    assert "left out: p/heavy" in error
