"""Topologies of real families, by the keys with which their config.json says what is MoE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from guard.program.configuration import TopologyError, topology_from_config, topology_from_folder
from guard.program.topology import MoELayer

QWEN3 = {"num_hidden_layers": 4, "num_experts": 128, "num_experts_per_tok": 8}
DEEPSEEK = {"num_hidden_layers": 6, "n_routed_experts": 256, "num_experts_per_tok": 8}
ERNIE = {"num_hidden_layers": 6, "moe_num_experts": 64, "moe_k": 6}
LLAMA4 = {"num_hidden_layers": 4, "num_local_experts": 16, "num_experts_per_tok": 1}

FAMILIES: list[Any] = [
    ("Qwen3Moe", {**QWEN3, "decoder_sparse_step": 1, "mlp_only_layers": []}, [0, 1, 2, 3], 128, 8),
    ("Qwen3Moe, in transformers 5", {"num_hidden_layers": 2, "num_local_experts": 128,
     "num_experts_per_tok": 8, "decoder_sparse_step": 1}, [0, 1], 128, 8),
    ("Qwen2Moe, every other layer", {"num_hidden_layers": 6, "num_experts": 60,
     "num_experts_per_tok": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5], 60, 4),
    ("Mixtral", {"num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2},
     [0, 1, 2], 8, 2),
    ("DeepseekV2", {**DEEPSEEK, "first_k_dense_replace": 1, "moe_layer_freq": 1},
     [1, 2, 3, 4, 5], 256, 8),
    ("DeepseekV3", {**DEEPSEEK, "first_k_dense_replace": 3}, [3, 4, 5], 256, 8),
    ("Deepseek, every other layer", {**DEEPSEEK, "first_k_dense_replace": 1, "moe_layer_freq": 2},
     [2, 4], 256, 8),
    ("MiMo, a list of layers", {**DEEPSEEK, "moe_layer_freq": [0, 1, 1, 0, 1, 1]},
     [1, 2, 4, 5], 256, 8),
    ("GptOss", {"num_hidden_layers": 2, "num_local_experts": 128, "num_experts_per_tok": 4},
     [0, 1], 128, 4),
    ("Llama4, Maverick", {**LLAMA4, "interleave_moe_layer_step": 2}, [1, 3], 16, 1),
    ("Llama4, said outright", {**LLAMA4, "interleave_moe_layer_step": 1, "moe_layers": [0, 3]},
     [0, 3], 16, 1),
    ("Ernie4_5", {**ERNIE, "moe_layer_start_index": 1, "moe_layer_end_index": 4,
     "moe_layer_interval": 1}, [1, 2, 3, 4], 64, 6),
    ("Ernie4_5, to the end", {**ERNIE, "moe_layer_start_index": 3, "moe_layer_end_index": -1,
     "moe_layer_interval": 2}, [3, 5], 64, 6),
    ("Jamba", {"num_hidden_layers": 6, "num_experts": 16, "num_experts_per_tok": 2,
     "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3, 5], 16, 2),
    ("Lfm2Moe", {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4,
     "num_dense_layers": 2}, [2, 3], 32, 4),
    ("HunYuan, a top-k for each layer", {"num_hidden_layers": 2, "num_experts": 64,
     "moe_topk": [8, 8]}, [0, 1], 64, 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "experts", "top_k"),
    [family[1:] for family in FAMILIES],
    ids=[family[0] for family in FAMILIES],
)
def test_the_moe_layers_of_real_families(
    config: Mapping[str, Any], layers: list[int], experts: int, top_k: int
) -> None:
    topology = topology_from_config({"architectures": ["X"], **config})

    assert topology.architecture == "X"
    assert topology.layers == tuple(MoELayer(number, experts, top_k) for number in layers)


def test_a_multimodal_model_keeps_its_experts_in_its_text_part() -> None:
    topology = topology_from_config(
        {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": QWEN3}
    )

    assert topology.architecture == "Qwen3VLMoeForConditionalGeneration"
    assert len(topology.layers) == 4


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 4},
        {**QWEN3, "num_experts": 0},
        {**DEEPSEEK, "n_routed_experts": None},
        {**DEEPSEEK, "num_experts_per_tok": None},
        {},
    ],
)
def test_a_dense_model_is_refused_by_name(config: Mapping[str, Any]) -> None:
    with pytest.raises(TopologyError, match="Qwen3ForCausalLM has no routed experts"):
        topology_from_config({"architectures": ["Qwen3ForCausalLM"], **config})


def test_a_model_whose_layers_are_all_dense_is_refused() -> None:
    with pytest.raises(TopologyError, match="every layer dense"):
        topology_from_config({**DEEPSEEK, "first_k_dense_replace": 6})


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{\n x", r"config\.json:2:2: not JSON"), ("[]", "a JSON object")],
)
def test_a_folder_without_a_good_config_is_refused_with_the_place(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(TopologyError, match=message):
        topology_from_folder(tmp_path)


def test_a_folder_is_read_and_so_is_a_config_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))

    assert topology_from_folder(tmp_path) == topology_from_folder(tmp_path / "config.json")
