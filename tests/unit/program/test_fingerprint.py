"""A model's fingerprint: the same for the same routers, whatever they are saved as; else another."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from guard.policy import PolicyError, PolicySet, load_policies
from guard.program.fingerprint import (
    FingerprintError,
    check_fingerprints,
    fingerprint_faults,
    fingerprint_of_folder,
)

NAME = "model.layers.{}.mlp.gate.weight"
OTHERS = {
    "model.embed_tokens.weight": torch.ones(4, 4),
    "model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(4, 4),
    "model.layers.0.mlp.shared_expert_gate.weight": torch.ones(1, 4),
    "model.layers.0.self_attn.gate.weight": torch.ones(4, 4),
}


def routers(
    seed: int = 0, name: str = NAME, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Of two layers, made in bfloat16. Some of their numbers are below float16's normal range."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 1e-2, 3e-5, 1e-6]).repeat(8)
    made = {
        name.format(layer): (torch.randn(16, 32, generator=generator) * scales).bfloat16().to(dtype)
        for layer in (0, 1)
    }
    made[name.format(0)][0, 0] = -0.0
    return made


def folder(path: Path, *files: Mapping[str, torch.Tensor], config: object = None) -> Path:
    path.mkdir()
    for number, tensors in enumerate(files):
        save_file(dict(tensors), path / f"model-{number}.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_only_routers_count(tmp_path: Path) -> None:
    bare = fingerprint_of_folder(folder(tmp_path / "bare", routers()))

    assert bare is not None
    assert bare.startswith("sha256:")
    assert fingerprint_of_folder(folder(tmp_path / "all", {**routers(), **OTHERS})) == bare
    assert fingerprint_of_folder(folder(tmp_path / "other", routers(seed=1))) != bare


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_another_precision_is_the_same_model(tmp_path: Path, dtype: torch.dtype) -> None:
    known = fingerprint_of_folder(folder(tmp_path / "known", routers()))

    assert fingerprint_of_folder(folder(tmp_path / "copy", routers(dtype=dtype))) == known


def test_rounding_is_that_of_torch(tmp_path: Path) -> None:
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    rounded = folder(tmp_path / "rounded", {NAME.format(0): wide.bfloat16()})

    exact = folder(tmp_path / "exact", {NAME.format(0): wide})

    assert fingerprint_of_folder(exact) == fingerprint_of_folder(rounded)


def test_one_number_less_is_another_model(tmp_path: Path) -> None:
    changed = routers()
    changed[NAME.format(1)][3, 4] = 0.25

    known = fingerprint_of_folder(folder(tmp_path / "known", routers()))

    assert fingerprint_of_folder(folder(tmp_path / "changed", changed)) != known


def test_layers_and_shapes_count(tmp_path: Path) -> None:
    gate = torch.zeros(4, 8)
    prints = {
        fingerprint_of_folder(folder(tmp_path / str(number), {NAME.format(layer): gate.reshape(shape)}))
        for number, (layer, shape) in enumerate([(0, (4, 8)), (1, (4, 8)), (0, (8, 4)), (10, (4, 8))])
    }

    assert len(prints) == 4


def test_files_are_one_model_whatever_is_in_which(tmp_path: Path) -> None:
    first, second = routers().items()

    whole = fingerprint_of_folder(folder(tmp_path / "whole", routers()))

    assert fingerprint_of_folder(folder(tmp_path / "split", dict([second]), dict([first]))) == whole


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    whole = fingerprint_of_folder(folder(tmp_path / "whole", routers()))
    both = folder(tmp_path / "both", routers(), routers(seed=1))
    assert fingerprint_of_folder(both) != whole

    index = {"weight_map": dict.fromkeys(routers(), "model-0.safetensors")}
    (both / "model.safetensors.index.json").write_text(json.dumps(index))

    assert fingerprint_of_folder(both) == whole


def test_draft_layers_do_not_count(tmp_path: Path) -> None:
    known = fingerprint_of_folder(folder(tmp_path / "known", routers()))
    drafts = {NAME.format(2): torch.ones(16, 32), "mtp.layers.0.mlp.gate.weight": torch.ones(16, 32)}
    config = {"num_hidden_layers": 2}

    path = folder(tmp_path / "drafting", {**routers(), **drafts}, config=config)

    assert fingerprint_of_folder(path) == known


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.block_sparse_moe.gate.weight",
        "model.layers.{}.block_sparse_moe.router.layer.weight",
        "model.layers.{}.mlp.router.weight",
        "model.layers.{}.mlp.gate.wg.weight",
        "model.layers.{}.mlp.router.classifier.weight",
        "model.layers.{}.feed_forward.router.weight",
        "model.layers.{}.router.proj.weight",
        "backbone.layers.{}.mixer.gate.weight",
        "language_model.model.layers.{}.feed_forward.router.weight",
        "transformer.blocks.{}.ffn.router.layer.weight",
        "layers.{}.gate.weight",
    ],
)
def test_families_name_their_routers_so(tmp_path: Path, name: str) -> None:
    known = fingerprint_of_folder(folder(tmp_path / "known", routers()))

    assert fingerprint_of_folder(folder(tmp_path / "family", routers(name=name))) == known


def test_a_folder_that_says_nothing_has_none(tmp_path: Path) -> None:
    quantised = {NAME.format(0): torch.ones(4, 4, dtype=torch.int8)}

    assert fingerprint_of_folder(folder(tmp_path / "empty")) is None
    assert fingerprint_of_folder(folder(tmp_path / "dense", OTHERS)) is None
    assert fingerprint_of_folder(folder(tmp_path / "quantised", quantised)) is None


@pytest.mark.parametrize(
    "data", [b"", b"\x08\0\0\0\0\0\0\0not json", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"]
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)

    with pytest.raises(FingerprintError, match=r"model\.safetensors: "):
        fingerprint_of_folder(tmp_path)


def test_a_file_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    path = folder(tmp_path / "short", routers()) / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(FingerprintError, match=r"ends within model\.layers\.1\.mlp\.gate\.weight"):
        fingerprint_of_folder(path.parent)


def asking(path: Path, fingerprint: str | None) -> PolicySet:
    """A policy whose profile has that fingerprint."""
    path.mkdir()
    model = {"architecture": "X"} | ({} if fingerprint is None else {"fingerprint": fingerprint})
    profile = {"apiVersion": "moe-guard/v1", "kind": "Profile", "model": model}
    (path / "m.json").write_text(json.dumps(profile))
    (path / "p.yaml").write_text(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n"
        "  profile: m.json\n  rules: [{name: r, when: always}]\n"
    )
    return load_policies(path)


def test_a_profile_of_other_weights_is_refused_where_it_is_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", routers())
    other = "sha256:" + "0" * 64
    policies = asking(tmp_path / "policies", other)

    with pytest.raises(PolicyError) as caught:
        check_fingerprints(policies, model)

    (fault,) = caught.value.faults
    assert (fault.location.line, fault.location.column) == (5, 12)
    assert f"m.json of policy 'p' is of other weights than {model}" in fault.message
    assert f"{other}, the model's is {fingerprint_of_folder(model)}" in fault.message
    assert "record and calibrate again with this model, or remove the fingerprint" in fault.message


def test_a_profile_of_these_weights_passes(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", routers())

    check_fingerprints(asking(tmp_path / "policies", fingerprint_of_folder(model)), model)


def test_weights_are_not_read_unless_a_profile_asks(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")

    assert fingerprint_faults(asking(tmp_path / "policies", None), tmp_path) == []


@pytest.mark.parametrize("model", ["some/model", "{}"])
def test_what_cannot_be_compared_is_not_refused_but_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str
) -> None:
    policies = asking(tmp_path / "policies", "sha256:" + "0" * 64)
    model = model.format(tmp_path)

    with caplog.at_level(logging.INFO, "guard.program.fingerprint"):
        assert fingerprint_faults(policies, model) == []

    (line,) = caplog.messages
    assert line.startswith(f"{model}: not compared with the fingerprints of profiles, as it ")
