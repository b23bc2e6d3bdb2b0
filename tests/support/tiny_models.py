"""Tiny models of random weights in Hugging Face's format; no tokenizer, so prompts are ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

VOCABULARY = 256
NUM_LAYERS = 4
NUM_EXPERTS = 16
TOP_K = 4

_HIDDEN = 64
_HEADS = 2
_HEAD_DIM = 32
_EXPERT_WIDTH = 64
_GATE_SCALE = 0.3
"""Router weights this large spread the choices: every expert of every layer is chosen often."""

Weights = dict[str, NDArray[np.float32]]


def write_tiny_moe(folder: Path) -> None:
    """A Qwen3-MoE of 4 layers with 16 experts each, 4 of which are chosen."""
    random = np.random.default_rng(0)
    weights = _shared_weights(random)
    for layer in range(NUM_LAYERS):
        block = f"model.layers.{layer}.mlp"
        weights[f"{block}.gate.weight"] = _matrix(random, NUM_EXPERTS, _HIDDEN, _GATE_SCALE)
        for expert in range(NUM_EXPERTS):
            weights |= _feed_forward(random, f"{block}.experts.{expert}")
    config = _config("Qwen3MoeForCausalLM", "qwen3_moe") | {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": _EXPERT_WIDTH,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    _write(folder, config, weights)


def write_tiny_dense(folder: Path) -> None:
    """A Qwen3 of the same size that has no experts."""
    random = np.random.default_rng(0)
    weights = _shared_weights(random)
    for layer in range(NUM_LAYERS):
        weights |= _feed_forward(random, f"model.layers.{layer}.mlp")
    _write(folder, _config("Qwen3ForCausalLM", "qwen3"), weights)


def _config(architecture: str, model_type: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _EXPERT_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }


def _shared_weights(random: np.random.Generator) -> Weights:
    weights: Weights = {
        "model.embed_tokens.weight": _matrix(random, VOCABULARY, _HIDDEN),
        "model.norm.weight": _ones(_HIDDEN),
    }
    heads = _HEADS * _HEAD_DIM
    for layer in range(NUM_LAYERS):
        block = f"model.layers.{layer}"
        weights |= {
            f"{block}.input_layernorm.weight": _ones(_HIDDEN),
            f"{block}.post_attention_layernorm.weight": _ones(_HIDDEN),
            f"{block}.self_attn.q_norm.weight": _ones(_HEAD_DIM),
            f"{block}.self_attn.k_norm.weight": _ones(_HEAD_DIM),
            f"{block}.self_attn.q_proj.weight": _matrix(random, heads, _HIDDEN),
            f"{block}.self_attn.k_proj.weight": _matrix(random, _HEAD_DIM, _HIDDEN),
            f"{block}.self_attn.v_proj.weight": _matrix(random, _HEAD_DIM, _HIDDEN),
            f"{block}.self_attn.o_proj.weight": _matrix(random, _HIDDEN, heads),
        }
    return weights


def _feed_forward(random: np.random.Generator, block: str) -> Weights:
    return {
        f"{block}.gate_proj.weight": _matrix(random, _EXPERT_WIDTH, _HIDDEN),
        f"{block}.up_proj.weight": _matrix(random, _EXPERT_WIDTH, _HIDDEN),
        f"{block}.down_proj.weight": _matrix(random, _HIDDEN, _EXPERT_WIDTH),
    }


def _matrix(
    random: np.random.Generator, rows: int, columns: int, scale: float = 0.08
) -> NDArray[np.float32]:
    return random.normal(0.0, scale, (rows, columns)).astype(np.float32)


def _ones(size: int) -> NDArray[np.float32]:
    return np.ones(size, dtype=np.float32)


def _write(folder: Path, config: dict[str, object], weights: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
