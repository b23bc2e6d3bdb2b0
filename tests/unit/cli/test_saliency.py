"""`moe-guard saliency`: a profile's neverMask list is written from what prompts show of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from guard.cli import app
from guard.policy import PolicyError, load_policies
from guard.program.fingerprint import fingerprint_of_folder

DEMO = Path(__file__).parents[3] / "demo"
ARCHITECTURE = "Qwen3MoeForCausalLM"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 layers with 8 experts, with a super expert: L1/E2."""
    folder = tmp_path_factory.mktemp("saliency") / "model"
    config = Qwen3MoeConfig(
        vocab_size=1536, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=12,
    )  # fmt: skip
    torch.manual_seed(0)
    made = Qwen3MoeForCausalLM(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts: Any = made.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[2] *= 200
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "model" / name, folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["Might quartz sand spoil a paraffin candle?", "Outline the protocol of turmeric."]
    lines = [{"prompt": text} for text in texts]
    chat = {"messages": [{"role": "user", "content": "Name ten towns by a river."}]}
    path.write_text("\n".join(map(json.dumps, [*lines, chat])))
    return path


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    content = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": ARCHITECTURE, "layers": 4},
        "provenance": "by hand",
        "neverMask": [
            {"layer": 0, "experts": [7], "reason": "super expert"},
            {"layer": 0, "experts": [6], "reason": "REAP saliency 9: number 1 of 4"},
        ],
        "sets": {
            "flagged": [{"layer": 1, "experts": [1, 2]}],
            "free": [{"layer": 1, "experts": [1]}],
        },
    }
    path.write_text(json.dumps(content))
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["saliency", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_list_is_written_and_what_others_wrote_stays(
    model: Path, prompts: Path, profile: Path
) -> None:
    options = ["--prompts", prompts, "--profile", profile]

    code, out, err = run(model, *options, "--top-saliency", "0.06")

    assert code == 0, err
    written = json.loads(profile.read_text())
    by_hand, super_expert, salient = written["neverMask"]
    assert by_hand == {"layer": 0, "experts": [7], "reason": "super expert"}
    assert (super_expert["layer"], super_expert["experts"]) == (1, [2])
    assert super_expert["reason"].startswith("super expert: largest down-projection output ")
    assert salient["reason"].startswith("REAP saliency ")
    assert salient["reason"].endswith(": number 2 of 32")
    assert out.splitlines()[0] == f"L1/E2: {super_expert['reason']}"
    assert written["model"]["fingerprint"] == fingerprint_of_folder(model)
    assert written["provenance"]["before"] == "by hand"
    facts = written["provenance"]["saliency"]
    assert (facts["topSaliency"], list(facts["prompts"])) == (0.06, [prompts.name])
    assert "model.fingerprint added" in err

    code, _, err = run(model, *options, "--top-saliency", "0")
    assert code == 0, err
    assert json.loads(profile.read_text())["neverMask"] == [by_hand, super_expert]
    assert "model.fingerprint added" not in err


def test_a_set_that_may_not_be_masked_any_more_is_named(
    model: Path, prompts: Path, profile: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
        "  profile: profile.json\n  experts: {flagged: [{set: flagged}]}\n"
        "  rules: [{name: r, when: always, then: {mask: {experts: flagged}}}]\n"
    )
    load_policies(policy)

    options = ["--prompts", prompts, "--profile", profile, "--top-saliency", "0"]
    code, _, err = run(model, *options)

    assert code == 0
    assert "the set 'flagged' holds L1/E2, which no policy may mask from now on" in err
    assert "'free'" not in err
    with pytest.raises(PolicyError, match="masks L1/E2, which the profile"):
        load_policies(policy)


def test_numbers_of_all_experts_are_reported(
    model: Path, prompts: Path, profile: Path, tmp_path: Path
) -> None:
    before, to, report = profile.read_text(), tmp_path / "new.json", tmp_path / "report.json"

    options = ["--prompts", prompts, "--profile", profile, "--out", to, "--report", report]
    code, _, err = run(model, *options, "--max-tokens-of-prompt", "5")

    assert code == 0, err
    assert profile.read_text() == before
    assert len(json.loads(to.read_text())["neverMask"]) == 2
    found = json.loads(report.read_text())
    assert (found["kind"], found["model"]["architecture"]) == ("Saliency", ARCHITECTURE)
    assert found["tokens"] == 15, "three prompts of five tokens"
    assert sum(expert["tokens"] for expert in found["experts"]) == 15 * 4 * 2
    assert sorted(expert["rank"] for expert in found["experts"]) == list(range(1, 33))
    [top] = [expert for expert in found["experts"] if expert["super"]]
    assert (top["layer"], top["expert"], top["rank"]) == (1, 2, 1)
    assert "were chosen by none" not in err

    code, _, err = run(model, *options, "--max-tokens-of-prompt", "1")
    unseen = sum(expert["tokens"] == 0 for expert in json.loads(report.read_text())["experts"])
    assert f"{unseen} of 32 experts were chosen by none of 3 tokens: nothing is known of them" in err


def changed(profile: Path, **of_model: object) -> str:
    content = json.loads(profile.read_text())
    content["model"] |= of_model
    profile.write_text(json.dumps(content))
    return profile.read_text()


@pytest.mark.parametrize(
    ("of_model", "message"),
    [
        ({"architecture": "MixtralForCausalLM"}, "is for a model with architecture"),
        ({"experts": 4}, "is for a model with experts: 4"),
        ({"fingerprint": "sha256:" + "0" * 64}, "is of other weights than"),
        ({"fingerprint": "0"}, "model.fingerprint: expected sha256: and 64 digits"),
    ],
)
def test_a_profile_of_another_model_is_left_as_it_is(
    model: Path, prompts: Path, profile: Path, of_model: dict[str, object], message: str
) -> None:
    before = changed(profile, **of_model)

    code, _, err = run(model, "--prompts", prompts, "--profile", profile)

    assert code == 1
    assert message in err
    assert profile.read_text() == before


def test_layers_that_the_configuration_does_not_have_are_refused(
    model: Path, prompts: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guard.discover import saliency

    monkeypatch.setattr(saliency, "_layer_of", lambda name: 4)

    code, _, err = run(model, "--prompts", prompts, "--profile", profile)

    assert code == 1
    assert "transformers has 32 experts in layers [4] of Qwen3MoeForCausalLM" in err


def test_a_folder_without_a_model_is_told(prompts: Path, profile: Path, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "--prompts", prompts, "--profile", profile)

    assert code == 1
    assert "config.json: cannot be read" in err


def test_the_demo_model_is_measured(prompts: Path, tmp_path: Path) -> None:
    profile = tmp_path / "demo.json"
    content = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": ARCHITECTURE},
    }
    profile.write_text(json.dumps(content))

    code, out, err = run(DEMO / "model", "--prompts", prompts, "--profile", profile)

    assert code == 0, err
    assert out
    assert len(json.loads(profile.read_text())["neverMask"]) == len(out.splitlines())
