"""A profile of other weights is refused by the server itself, at its start and at a reload."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from guard_vllm import start
from guard_vllm.core_reload import CORE_COMMIT_METHOD, CORE_PREPARE_METHOD, CORE_PROGRAM_METHOD
from guard_vllm.reload import Reloader
from guard_vllm.settings import Settings
from safetensors.numpy import save_file

from guard.policy import PolicyError, PolicySet, load_policies
from guard.program.codec import encode_program
from guard.program.compile import compile_policies
from guard.program.configuration import topology_from_config
from guard.program.fingerprint import fingerprint_of_folder

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
OTHER = "sha256:" + "0" * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    gate = np.arange(16, dtype=np.float32).reshape(4, 4)
    save_file({"model.layers.0.mlp.gate.weight": gate}, path / "model.safetensors")
    return path


@pytest.fixture
def policies(tmp_path: Path) -> Callable[[str | None], Path]:
    """Writes a policy whose profile has that fingerprint."""

    def write(fingerprint: str | None) -> Path:
        of_model = {"architecture": "Qwen3MoeForCausalLM"}
        if fingerprint is not None:
            of_model["fingerprint"] = fingerprint
        profile = {"apiVersion": "moe-guard/v1", "kind": "Profile", "model": of_model}
        (tmp_path / "m.json").write_text(json.dumps(profile))
        path = tmp_path / "p.yaml"
        path.write_text(
            "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
            "  profile: m.json\n  rules: [{name: r, when: always}]\n"
        )
        return path

    return write


def resolve(monkeypatch: pytest.MonkeyPatch, model: str, policies: Path) -> Settings:
    """What a server of that model checks first, but for vLLM's other settings."""
    monkeypatch.setattr(start, "check_host", lambda config: None)
    monkeypatch.setattr(start, "refuse_unguarded_frontends", lambda *_: None)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model=model, hf_config=SimpleNamespace(to_dict=lambda: CONFIG)),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    return start.resolve(config, Settings(policies=str(policies)))


def test_a_server_does_not_start_with_a_profile_of_other_weights(
    monkeypatch: pytest.MonkeyPatch, model: Path, policies: Callable[[str | None], Path]
) -> None:
    monkeypatch.setenv("MOE_GUARD_KERNELS", "torch")

    with pytest.raises(PolicyError, match="of other weights than"):
        resolve(monkeypatch, str(model), policies(OTHER))

    resolve(monkeypatch, str(model), policies(fingerprint_of_folder(model)))
    resolve(monkeypatch, "some/model", policies(OTHER))  # there is nothing to compare with


class Bus:
    revision = "before"

    def note_reload(self, *, succeeded: bool) -> None:
        pass


def test_a_reload_does_not_bring_a_profile_of_other_weights(
    model: Path, policies: Callable[[str | None], Path]
) -> None:
    topology, asked = topology_from_config(CONFIG), []

    def loaded(fingerprint: str | None) -> PolicySet:
        return load_policies(policies(fingerprint))

    running = encode_program(compile_policies(loaded(None), topology))

    def call(method: str, *args: object) -> list[object]:
        asked.append(method)
        return [{CORE_PROGRAM_METHOD: running, CORE_PREPARE_METHOD: ""}.get(method, "")]

    reloader = Reloader(call, Bus(), observe_only=False, model=str(model))  # type: ignore[arg-type]
    refused = reloader.apply(lambda: loaded(OTHER))
    assert refused.fault is not None
    assert "of other weights than" in refused.fault
    assert asked == [CORE_PROGRAM_METHOD]

    assert reloader.apply(lambda: loaded(fingerprint_of_folder(model))).is_in_force
    assert asked[-1] == CORE_COMMIT_METHOD
