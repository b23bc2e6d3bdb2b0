"""A model's topology as its `config.json` tells it: enough to check policies before anything is loaded.

The loaded model has the last word; the data plane is compiled against that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard.errors import GuardError
from guard.program.router_facts import router_of
from guard.program.topology import MoELayer, Topology

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
_NUM_DENSE = ("first_k_dense_replace", "num_dense_layers")


EXACT_ARCHITECTURES = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Gemma4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GptOssForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "JambaForCausalLM",
        "Lfm2MoeForCausalLM",
        "Llama4ForCausalLM",
        "MiniMaxM2ForCausalLM",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "OlmoeForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
    }
)
"""Families whose configurations are read exactly: for others only the loaded model is believed."""


class TopologyError(GuardError):
    """A model whose MoE layers cannot be told from its configuration."""


def topology_from_folder(model: Path) -> Topology:
    """The topology of a model folder. Raises TopologyError."""
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TopologyError(
            f"{path}: cannot be read ({error.strerror}); name a model folder"
        ) from error
    except json.JSONDecodeError as error:
        raise TopologyError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise TopologyError(f"{path}: a model's configuration is a JSON object")
    return topology_from_config(config)


def topology_from_config(config: Mapping[str, Any]) -> Topology:
    """From a Hugging Face configuration. Raises TopologyError for a model without routed experts."""
    architectures = config.get("architectures") or ["unknown"]
    text = config.get("text_config") or config
    text = {**text, **(text.get("ffn_config") or {})}  # DBRX keeps its experts apart
    num_experts = _first(text, _NUM_EXPERTS)
    top_k = _first(text, _TOP_K)
    num_layers = _num_layers(architectures[0], text)
    if not num_experts or not top_k or not num_layers:
        raise TopologyError(
            f"{architectures[0]} has no routed experts in its configuration, so it is not a "
            "Mixture-of-Experts model that MoE Guard can guard; serve one that is, or start without "
            "policies"
        )
    layers = tuple(
        MoELayer(
            number,
            _of_layer(num_experts, number),
            _of_layer(top_k, number),
            router_of(architectures[0], text, number),
        )
        for number in range(int(num_layers))
        if _is_moe(text, number)
    )
    if not layers:
        raise TopologyError(
            f"{architectures[0]} has experts, but its configuration makes every layer dense; mend "
            "its config.json, or start without policies"
        )
    return Topology(str(architectures[0]), layers)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key)), None)


def _of_layer(value: Any, number: int) -> int:
    return int(value[number] if isinstance(value, list) else value)


def _num_layers(architecture: str, config: Mapping[str, Any]) -> int:
    """Layers as the model numbers them: a hybrid stack counts its mixers, and LongCat's layer has two
    attentions, which `num_hidden_layers` counts."""
    if kinds := _hybrid_kinds(config):
        return len(kinds)
    if architecture.startswith("LongcatFlash"):
        return int(config.get("num_layers") or 0)
    return int(config.get("num_hidden_layers") or config.get("n_layers") or 0)


def _hybrid_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What each layer of a Nemotron-H stack is; "E" or "moe" has the experts."""
    return tuple(config.get("hybrid_override_pattern") or config.get("layers_block_type") or ())


def _is_moe(config: Mapping[str, Any], number: int) -> bool:
    """The keys by which families say which of their layers are dense."""
    kinds = _hybrid_kinds(config)
    if "E" in kinds or "moe" in kinds:
        return kinds[number] in ("E", "moe")
    if number < len(kinds := config.get("mlp_layer_types") or ()) and kinds[number] == "dense":
        return False
    if number in (config.get("mlp_only_layers") or ()):
        return False
    if number < max(config.get(key) or 0 for key in _NUM_DENSE):
        return False
    first, last = config.get("moe_layer_start_index"), config.get("moe_layer_end_index", -1)
    if isinstance(first, int) and isinstance(last, int):
        within = first <= number and (last < 0 or number <= last)
        return within and (number + 1) % (config.get("moe_layer_interval") or 1) == 0
    period = config.get("expert_layer_period")
    if period:
        return bool(number % period == (config.get("expert_layer_offset") or 0))
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        return bool(frequency[number])
    if isinstance(frequency, int) and number % frequency:
        return False
    moe_layers = config.get("moe_layers")
    if isinstance(moe_layers, list):
        return number in moe_layers
    if isinstance(enumerated := config.get("moe_layers_enum"), str):
        return number in map(int, enumerated.split(","))
    every = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step", 1)
    return every > 0 and (number + 1) % int(every) == 0
