"""How a family's routers choose, as its configuration and the published model code tell it.

Each entry was read in the family's model code (transformers, or vLLM where it has its own); what a
configuration does not say there, the code fixes. The keys are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from guard.program.topology import PLAIN_SOFTMAX, Router

Config = Mapping[str, Any]

DEFAULT_HASH_LAYERS: Final = 3
"""DeepSeek-V4 where its configuration does not say."""


def router_of(architecture: str, config: Config, number: int) -> Router:
    """The router of layer `number`; plain softmax for a family that is not known here.

    config: the text part of a multimodal model's
    """
    of_family = _FAMILIES.get(architecture)
    return PLAIN_SOFTMAX if of_family is None else of_family(config, number)


def _softmax(*, renormalize: bool) -> Callable[[Config, int], Router]:
    return lambda config, number: Router("softmax", renormalize)


def _softmax_as_said(*, default: bool) -> Callable[[Config, int], Router]:
    """default: renormalisation where the configuration leaves it out"""
    return lambda config, number: Router("softmax", bool(config.get("norm_topk_prob", default)))


def _deepseek(config: Config, _: int) -> Router:
    """V2 chooses by plain scores, V3 and Kimi-K2 under a bias (`noaux_tc`)."""
    has_bias = config.get("topk_method") == "noaux_tc"
    scoring = config.get("scoring_func") or "softmax"
    return _grouped(config, scoring=scoring, has_bias=has_bias, renormalize=has_bias)


def _sigmoid_grouped(config: Config, _: int) -> Router:
    return _grouped(config, scoring="sigmoid", has_bias=True, renormalize=True)


def _grouped(config: Config, *, scoring: str, has_bias: bool, renormalize: bool) -> Router:
    """renormalize: where the configuration leaves it out. Groups that do not divide the experts, or
    hold one each, are no groups to vLLM."""
    num_groups, num_experts = int(config.get("n_group") or 1), int(config.get("n_routed_experts") or 0)
    if num_experts % num_groups or num_experts <= num_groups:
        num_groups = 1
    return Router(
        scoring,
        renormalize=bool(config.get("norm_topk_prob", renormalize)),
        num_groups=num_groups,
        topk_groups=min(num_groups, int(config.get("topk_group") or 1)),
        has_bias=has_bias,
    )


def _deepseek_v4(config: Config, number: int) -> Router:
    kinds = config.get("mlp_layer_types")
    if kinds:
        is_hashed = kinds[number] == "hash_moe"
    else:
        is_hashed = number < int(config.get("num_hash_layers", DEFAULT_HASH_LAYERS))
    scoring = config.get("scoring_func") or "sqrtsoftplus"
    renormalize = bool(config.get("norm_topk_prob", True))
    if is_hashed:
        return Router(scoring, renormalize, kind="hash")
    return Router(scoring, renormalize, has_bias=True)


def _ernie(_: Config, __: int) -> Router:
    return Router("softmax", renormalize=True, has_bias=True)


def _lfm2(config: Config, _: int) -> Router:
    return Router(
        "sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        has_bias=bool(config.get("use_expert_bias", True)),
    )


def _llama4(_: Config, __: int) -> Router:
    return Router("sigmoid", renormalize=False)


def _longcat(config: Config, _: int) -> Router:
    return Router(
        "softmax",
        renormalize=False,
        has_bias=True,
        num_zero_experts=int(config.get("zero_expert_num") or 0),
    )


def _minimax_m2(config: Config, _: int) -> Router:
    return Router(
        config.get("scoring_func") or "sigmoid",
        renormalize=True,
        has_bias=bool(config.get("use_routing_bias", False)),
    )


def _step3p5(config: Config, _: int) -> Router:
    scoring = config.get("moe_router_activation") or "sigmoid"
    return Router(scoring, bool(config.get("norm_expert_weight", True)), has_bias=True)


def _phi(_: Config, __: int) -> Router:
    return Router("softmax", renormalize=False, kind="sparsemixer")


_FAMILIES: Final[Mapping[str, Callable[[Config, int], Router]]] = {
    "DbrxForCausalLM": _softmax(renormalize=True),
    "DeepseekV2ForCausalLM": _deepseek,
    "DeepseekV3ForCausalLM": _deepseek,
    "DeepseekV32ForCausalLM": _deepseek,
    "DeepseekV4ForCausalLM": _deepseek_v4,
    "Ernie4_5_MoeForCausalLM": _ernie,
    "Gemma4ForCausalLM": _softmax(renormalize=True),
    "Gemma4ForConditionalGeneration": _softmax(renormalize=True),
    "Glm4MoeForCausalLM": _sigmoid_grouped,
    "GptOssForCausalLM": _softmax(renormalize=True),
    "GraniteMoeForCausalLM": _softmax(renormalize=True),
    "GraniteMoeHybridForCausalLM": _softmax(renormalize=True),
    "GraniteMoeSharedForCausalLM": _softmax(renormalize=True),
    "JambaForCausalLM": _softmax(renormalize=False),
    "Lfm2MoeForCausalLM": _lfm2,
    "Llama4ForCausalLM": _llama4,
    "Llama4ForConditionalGeneration": _llama4,
    "LongcatFlashForCausalLM": _longcat,
    "MiniMaxM2ForCausalLM": _minimax_m2,
    "MixtralForCausalLM": _softmax(renormalize=True),
    "NemotronHForCausalLM": _sigmoid_grouped,
    "OlmoeForCausalLM": _softmax(renormalize=False),
    "PhiMoEForCausalLM": _phi,
    "PhimoeForCausalLM": _phi,
    "Qwen2MoeForCausalLM": _softmax_as_said(default=False),
    "Qwen3MoeForCausalLM": _softmax_as_said(default=False),
    "Qwen3NextForCausalLM": _softmax_as_said(default=True),
    "Qwen3VLMoeForConditionalGeneration": _softmax_as_said(default=False),
    "Step3p5ForCausalLM": _step3p5,
}
