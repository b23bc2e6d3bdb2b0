"""Topologies of real families, by the keys with which their config.json says what is MoE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from guard.program.configuration import TopologyError, topology_from_config, topology_from_folder
from guard.program.topology import MoELayer, Router

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


GROUPED = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True}
NEMOTRON = {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}

ROUTERS: list[Any] = [
    ("Qwen3MoeForCausalLM", {**QWEN3, "norm_topk_prob": True}, [0, 1, 2, 3], Router()),
    ("Qwen2MoeForCausalLM", QWEN3, [0, 1, 2, 3], Router(renormalize=False)),
    ("Qwen3NextForCausalLM", {**QWEN3, "mlp_only_layers": [1], "decoder_sparse_step": 1},
     [0, 2, 3], Router()),
    ("Qwen3VLMoeForConditionalGeneration", {"text_config": {**QWEN3, "norm_topk_prob": True}},
     [0, 1, 2, 3], Router()),
    ("MixtralForCausalLM", {"num_hidden_layers": 1, "num_local_experts": 8,
     "num_experts_per_tok": 2}, [0], Router()),
    ("OlmoeForCausalLM", QWEN3, [0, 1, 2, 3], Router(renormalize=False)),
    ("GptOssForCausalLM", {"num_hidden_layers": 1, "num_local_experts": 32,
     "num_experts_per_tok": 4}, [0], Router()),
    ("GraniteMoeForCausalLM", {"num_hidden_layers": 1, "num_local_experts": 32,
     "num_experts_per_tok": 8}, [0], Router()),
    ("GraniteMoeHybridForCausalLM", {"num_hidden_layers": 3, "num_local_experts": 62,
     "num_experts_per_tok": 6, "layers_block_type": ["mamba", "attention", "mamba"]},
     [0, 1, 2], Router()),
    ("JambaForCausalLM", {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2,
     "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3], Router(renormalize=False)),
    ("DeepseekV2ForCausalLM", {**DEEPSEEK, "first_k_dense_replace": 1, "n_group": 8,
     "topk_group": 3, "norm_topk_prob": False, "scoring_func": "softmax",
     "topk_method": "group_limited_greedy"}, [1, 2, 3, 4, 5],
     Router(renormalize=False, num_groups=8, topk_groups=3)),
    ("DeepseekV3ForCausalLM", {**DEEPSEEK, **GROUPED, "first_k_dense_replace": 3,
     "scoring_func": "sigmoid", "topk_method": "noaux_tc"}, [3, 4, 5],
     Router("sigmoid", num_groups=8, topk_groups=4, has_bias=True)),
    ("DeepseekV3ForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1,  # Kimi-K2
     "first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
     [1, 2, 3, 4, 5], Router("sigmoid", has_bias=True)),
    ("Glm4MoeForCausalLM", {**DEEPSEEK, "n_group": 1, "topk_group": 1,
     "first_k_dense_replace": 3}, [3, 4, 5], Router("sigmoid", has_bias=True)),
    ("Glm4MoeForCausalLM", {**DEEPSEEK, "n_group": 3, "topk_group": 2}, [0, 1, 2, 3, 4, 5],
     Router("sigmoid", has_bias=True)),
    ("MiniMaxM2ForCausalLM", {"num_hidden_layers": 1, "num_local_experts": 256,
     "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_routing_bias": True}, [0],
     Router("sigmoid", has_bias=True)),
    ("Ernie4_5_MoeForCausalLM", {**ERNIE, "moe_layer_start_index": 1, "moe_layer_end_index": 5,
     "moe_layer_interval": 1}, [1, 2, 3, 4, 5], Router(has_bias=True)),
    ("Lfm2MoeForCausalLM", {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4,
     "num_dense_layers": 2, "use_expert_bias": True, "norm_topk_prob": True}, [2, 3],
     Router("sigmoid", has_bias=True)),
    ("Llama4ForConditionalGeneration", {"text_config": {**LLAMA4, "interleave_moe_layer_step": 2}},
     [1, 3], Router("sigmoid", renormalize=False)),
    ("PhiMoEForCausalLM", {"num_hidden_layers": 1, "num_local_experts": 16,
     "num_experts_per_tok": 2}, [0], Router(renormalize=False, kind="sparsemixer")),
    ("Gemma4ForConditionalGeneration", {"text_config": {"num_hidden_layers": 1,
     "num_experts": 128, "top_k_experts": 8}}, [0], Router()),
    ("NemotronHForCausalLM", {**NEMOTRON, "hybrid_override_pattern": "ME*E-"}, [1, 3],
     Router("sigmoid", has_bias=True)),
    ("NemotronHForCausalLM", {**NEMOTRON,
     "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]}, [1, 4],
     Router("sigmoid", has_bias=True)),
    ("DbrxForCausalLM", {"n_layers": 2, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
     [0, 1], Router()),
    ("Step3p5ForCausalLM", {"num_hidden_layers": 4, "moe_num_experts": 288, "moe_top_k": 8,
     "moe_layers_enum": "1, 3", "moe_router_activation": "sigmoid", "norm_expert_weight": True},
     [1, 3], Router("sigmoid", has_bias=True)),
    ("LongcatFlashForCausalLM", {"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 512,
     "moe_topk": 12, "zero_expert_num": 256}, [0, 1],
     Router(renormalize=False, has_bias=True, num_zero_experts=256)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "layers", "router"),
    ROUTERS,
    ids=[f"{number}-{row[0]}" for number, row in enumerate(ROUTERS)],
)
def test_the_routers_of_real_families(
    architecture: str, config: Mapping[str, Any], layers: list[int], router: Router
) -> None:
    topology = topology_from_config({"architectures": [architecture], **config})

    assert [layer.number for layer in topology.layers] == layers
    assert {layer.router for layer in topology.layers} == {router}


@pytest.mark.parametrize(
    "said",
    [
        {"num_hash_layers": 2},
        {"mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe", "moe"]},
    ],
)
def test_the_first_layers_of_deepseek_v4_are_routed_by_a_table(said: Mapping[str, Any]) -> None:
    topology = topology_from_config({"architectures": ["DeepseekV4ForCausalLM"], **DEEPSEEK, **said})

    assert [layer.router.kind for layer in topology.layers] == ["hash"] * 2 + ["topk"] * 4
    assert topology.layers[2].router == Router("sqrtsoftplus", has_bias=True)


def test_a_llama_4_without_moe_layers_is_refused() -> None:
    with pytest.raises(TopologyError, match="every layer dense"):
        topology_from_config({**LLAMA4, "interleave_moe_layer_step": 0})


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
