"""`moe-guard causal` but for vLLM: what it hands over and writes, and what policies may then do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard.cli import app
from guard.policy import PolicyError, load_policies
from guard.trace.format import TraceHeader
from guard.trace.writer import TraceWriter
from tests.support.planted_trace import Planted

command = sys.modules["guard.cli.causal"]  # `guard.cli.causal` is the function of that name
PLANTED = Planted(layers=4, experts=16, planted=3, pairs=8, tokens=12)
POLICY = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  profile: profile.json\n"
    "  experts: {own: [{set: planted}]}\n"
    "  rules: [{name: r, when: always, then: {mask: {experts: own, method: reroute}}}]\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path / "t.moetrace", TraceHeader("planted", PLANTED.topology)) as writer:
        for request in PLANTED.requests():
            writer.write(request)
    sets = [{"layer": layer, "experts": [expert]} for layer, expert in PLANTED.planted_experts]
    profile = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": "PlantedForCausalLM"},
        "sets": {"planted": sets},
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    lines = [{"prompt": f"text {n}", "label": "bad" if n % 2 else "benign"} for n in range(20)]
    lines.append({"prompt": "of neither", "label": "other"})
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path


def vllm(increases: Callable[[Mapping[str, Any], int], float]) -> Callable[..., None]:
    """In the place of vLLM's process. increases: nats a token, by text and number of the mask"""

    def run(module: str, job: Mapping[str, Any]) -> None:
        assert module == "guard_vllm.causal_offline"
        texts = []
        for number, text in enumerate(job["texts"]):
            unmasked = 20.0 + number % 3
            masked = [unmasked + 10 * increases(text, mask) for mask in range(len(job["sets"]))]
            texts.append({"tokens": 10, "losses": [unmasked, *masked]})
        tasks = [[True, False, *[True] * (len(job["sets"]) - 1)] for _ in job["tasks"]]
        Path(job["out"]).write_text(json.dumps({"texts": texts, "tasks": tasks}))

    return run


def run(folder: Path, *more: str) -> tuple[int, str, str]:
    arguments = [
        *("causal", "MODEL", "--profile", str(folder / "profile.json"), "--set", "planted"),
        *("--trace", str(folder / "t.moetrace"), "--texts", str(folder / "texts.jsonl")),
        *("--target", "bad", *more),
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr.replace("\n", " ")


def matters(text: Mapping[str, Any], mask: int) -> float:
    if text["labels"]["label"] == "bad":
        return 1.0 if mask == 0 else 0.1
    return 0.001


def test_a_set_that_matters_passes_and_may_be_masked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_job", vllm(matters))
    report = folder / "causal.json"
    code, text, error = run(
        folder, "--tasks", str(folder / "tasks.jsonl"), "--report", str(report), "--random", "5"
    )
    assert code == 0, error
    assert text.startswith("Passed: masking the set raises the target's loss 10.0 times as much")
    check = json.loads((folder / "profile.json").read_text())["causal"]["planted"]
    assert check["passed"] is True
    assert check["texts"] == 10
    assert len(check["randomIncreases"]) == 5
    assert check["tasks"] == {"prompts": 4, "unmasked": 1.0, "masked": 0.0, "random": 1.0}
    assert check["data"].keys() == {"t.moetrace", "texts.jsonl", "tasks.jsonl"}
    assert json.loads(report.read_text())["kind"] == "CausalCheck"
    assert len(load_policies(folder / "policy.yaml").policies) == 1
    page = folder / "page.html"
    assert CliRunner().invoke(app, ["report", str(report), "--out", str(page)]).exit_code == 0
    assert "Masking planted" in page.read_text()


def test_one_that_does_not_is_masked_by_no_policy_but_with_an_override(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_job", vllm(lambda text, mask: 0.1))
    code, text, _ = run(folder)
    assert code == 2
    assert text.startswith("Did not pass: it raises the target's loss 1.0 times as much")
    with pytest.raises(PolicyError, match="the set 'planted' did not pass its causal check"):
        load_policies(folder / "policy.yaml")
    code, _, _ = run(folder, "--override", "the red team wants to see it")
    assert code == 2
    written = json.loads((folder / "profile.json").read_text())["causal"]["planted"]
    assert written["override"] == "the red team wants to see it"
    assert len(load_policies(folder / "policy.yaml").policies) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "plantd"), "has no set 'plantd'; did you mean 'planted'?"),
        (("--target", "worse"), "no text has label 'worse'"),
        (("--vllm", "[]"), "a JSON object"),
        (("--tasks", "texts.jsonl"), "has no `answer`"),
    ],
)
def test_what_is_not_there_is_refused_before_vllm_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, str], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(command, "run_job", lambda *_: pytest.fail("vLLM was started"))
    code, _, error = run(folder, *more)
    assert code == 1
    assert message in error
