"""A tiny model of each router family: configurations only, `random_weights` fills them in.

About 3 layers, hidden 64 to 128, 8 to 32 experts. Attention that a CPU cannot run smaller decides the
rest: MLA has a latent of 512 and 64 rotary dimensions, linear attention heads of 128.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.thorough import runs_family

VOCABULARY = 256
LAYERS = 3
EXPERTS = 16
TOP_K = 4
HIDDEN = 64
WIDTH = 32

BIAS_OF_GLM_5_2 = (7.0, 0.12)
BIAS_OF_GLM_5_1 = (34.5, 0.14)
"""Means and half spreads of real correction biases: a large offset with a tiny spread."""

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """error: part of vLLM's own message; why: the same for a reader

    without_avx512: part of the message on a CPU without AVX-512, where it is another one
    """

    error: str
    why: str
    without_avx512: str = ""

    def explains(self, message: str) -> bool:
        return self.error in message or bool(self.without_avx512 and self.without_avx512 in message)


@dataclass(frozen=True, slots=True)
class Family:
    """moe_layers: the model's own layer numbers; groups, kept_groups: of a grouped router.

    v2, compiled: it is run there as well, for its router's mechanism or its kind of stack
    hash_layers: those of moe_layers that a table routes, so that no mask can name them
    failure: of one that vLLM itself cannot run here
    refusal: part of the guard's own message where it does not start on this one
    """

    name: str
    config: Config
    moe_layers: tuple[int, ...] = (0, 1, 2)
    num_experts: int = EXPERTS
    top_k: int = TOP_K
    renormalizes: bool = True
    groups: int = 1
    kept_groups: int = 1
    correction_bias: tuple[float, float] = (0.0, 0.1)
    engine: dict[str, Any] = field(default_factory=dict)
    v2: bool = False
    compiled: bool = False
    hash_layers: tuple[int, ...] = ()
    failure: Failure | None = None
    refusal: str = ""

    def runs_on(self, place: str) -> bool:
        """place: v1, v2 or compiled"""
        chosen = {"v1": True, "v2": self.v2, "compiled": self.compiled}[place]
        chosen = chosen and runs_family(place, self.name)
        return chosen and not self.failure and not self.refusal

    @property
    def is_recorded(self) -> bool:
        """vLLM's own record needs the prefix cache, which MLA and hybrids do without on a CPU."""
        hybrid = self.engine.get("enable_prefix_caching") is False
        return not hybrid and "kv_lora_rank" not in self.config

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())

    def write(self, folder: Path) -> Path:
        """Its config.json, for `load_format="dummy"`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        return folder


def _config(architecture: str, model_type: str, **own: Any) -> Config:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "num_experts_per_tok": TOP_K,
        "dtype": "float32",
    } | own


_MLA: Config = {
    "dtype": "bfloat16",  # the kernels of a CPU know no wider one
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def _deepseek_v3(name: str, bias: tuple[float, float], groups: int, kept: int, **own: Any) -> Family:
    words: Config = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "n_group": groups,
        "topk_group": kept,
    }
    config = _config("DeepseekV3ForCausalLM", "deepseek_v3", **_MLA, **(words | own))
    return Family(
        name,
        config,
        moe_layers=(1, 2),
        groups=groups,
        kept_groups=kept,
        correction_bias=bias,
        v2=name == "DeepSeek-V3",
        compiled=name == "DeepSeek-V3",
    )


def _glm(name: str, architecture: str, model_type: str, **own: Any) -> Family:
    words: Config = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    }
    config = _config(architecture, model_type, **(words | own))
    return Family(
        name, config, moe_layers=(1, 2), correction_bias=BIAS_OF_GLM_5_2, v2=name == "GLM-4.5"
    )


_LINEAR_ATTENTION: Config = {
    "dtype": "bfloat16",
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "shared_expert_intermediate_size": WIDTH,
    "partial_rotary_factor": 0.25,
    "norm_topk_prob": True,
    "num_experts": EXPERTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_HYBRID_ENGINE = {"mamba_cache_mode": "none", "enable_prefix_caching": False, "block_size": None}

FAMILIES: tuple[Family, ...] = (
    Family(
        "Qwen3-MoE",
        _config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            num_experts=EXPERTS,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
        compiled=True,
        v2=True,
    ),
    Family("Mixtral", _config("MixtralForCausalLM", "mixtral", num_local_experts=EXPERTS)),
    Family(
        "OLMoE",
        _config(
            "OlmoeForCausalLM",
            "olmoe",
            num_experts=EXPERTS,
            norm_topk_prob=False,
            num_key_value_heads=2,
            head_dim=None,
        ),
        renormalizes=False,
        v2=True,
    ),
    Family(
        "Qwen2-MoE",
        _config(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            num_experts=EXPERTS,
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            shared_expert_intermediate_size=WIDTH,
        ),
        renormalizes=False,
        v2=True,
    ),
    Family(
        "DeepSeek-V2-Lite",
        _config(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            **_MLA,
            n_routed_experts=EXPERTS,
            n_shared_experts=2,
            first_k_dense_replace=1,
            norm_topk_prob=False,
            topk_method="greedy",
            scoring_func="softmax",
            routed_scaling_factor=1.0,
            n_group=1,
            topk_group=1,
        ),
        moe_layers=(1, 2),
        renormalizes=False,
        v2=True,
    ),
    _deepseek_v3("DeepSeek-V3", BIAS_OF_GLM_5_2, 4, 2),
    _deepseek_v3("DeepSeek-V3, bias 34.5", BIAS_OF_GLM_5_1, 4, 2),
    _deepseek_v3("Kimi-K2", BIAS_OF_GLM_5_2, 1, 1),
    _glm("GLM-4.5", "Glm4MoeForCausalLM", "glm4_moe", num_attention_heads=4),
    _glm("GLM-4-MoE-Lite", "Glm4MoeLiteForCausalLM", "glm4_moe_lite", **_MLA),
    Family(
        "Granite-MoE",
        _config(
            "GraniteMoeForCausalLM",
            "granitemoe",
            num_local_experts=EXPERTS,
            embedding_multiplier=1.0,
            attention_multiplier=0.2,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
    ),
    Family(
        "gpt-oss",
        _config(
            "GptOssForCausalLM",
            "gpt_oss",
            num_local_experts=EXPERTS,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_scaling=None,
        ),
        v2=True,
    ),
    Family(
        "ERNIE-4.5-MoE",
        _config(
            "Ernie4_5_MoeForCausalLM",
            "ernie4_5_moe",
            moe_num_experts=EXPERTS,
            moe_k=TOP_K,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            moe_layer_interval=1,
            use_bias=False,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
        v2=True,
    ),
    Family(
        "Llama 4",
        _config(
            "Llama4ForCausalLM",
            "llama4_text",
            num_hidden_layers=4,
            num_local_experts=8,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=64,
            attention_chunk_size=512,
        ),
        moe_layers=(1, 3),
        num_experts=8,
        top_k=1,
        renormalizes=False,
        compiled=True,
        v2=True,
    ),
    Family(
        "Gemma 4",
        _config(
            "Gemma4ForCausalLM",
            "gemma4_text",
            enable_moe_block=True,
            num_experts=EXPERTS,
            top_k_experts=TOP_K,
            sliding_window=64,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            global_head_dim=64,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            hidden_activation="gelu_pytorch_tanh",
            num_kv_shared_layers=0,
        ),
        v2=True,
    ),
    Family(
        "Hunyuan-MoE-V1",
        _config(
            "HunYuanMoEV1ForCausalLM",
            "hunyuan_v1_moe",
            num_experts=EXPERTS,
            moe_topk=[TOP_K] * LAYERS,
            num_shared_expert=[1] * LAYERS,
            use_mixed_mlp_moe=True,
            use_qk_norm=True,
            rope_scaling=None,
        ),
        refusal="custom_routing_function, which is not known to this release",
    ),
    Family(
        "dots1",
        _config(
            "Dots1ForCausalLM",
            "dots1",
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            routed_scaling_factor=1.0,
            n_group=4,
            topk_group=2,
            moe_layer_freq=1,
        ),
        moe_layers=(1, 2),
        groups=4,
        kept_groups=2,
        correction_bias=BIAS_OF_GLM_5_2,
    ),
    Family(
        "LFM2-MoE",
        _config(
            "Lfm2MoeForCausalLM",
            "lfm2_moe",
            num_experts=EXPERTS,
            num_dense_layers=1,
            layer_types=["conv", "full_attention", "conv"],
            use_expert_bias=True,
            norm_topk_prob=True,
            norm_eps=1e-6,
            conv_L_cache=3,
            routed_scaling_factor=1.0,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
        engine=_HYBRID_ENGINE,
        v2=True,
    ),
    Family(
        "Qwen3-Next",
        _config("Qwen3NextForCausalLM", "qwen3_next", **_LINEAR_ATTENTION),
        engine=_HYBRID_ENGINE,
        v2=True,
    ),
    Family(
        "Qwen3.5-MoE",
        _config("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", **_LINEAR_ATTENTION),
        engine=_HYBRID_ENGINE,
        failure=Failure(
            "failed to be inspected",
            "its module imports torchvision, which is not there for this torch",
        ),
    ),
    Family(
        "Nemotron-H",
        _config(
            "NemotronHForCausalLM",
            "nemotron_h",
            num_hidden_layers=4,
            hybrid_override_pattern="ME*E",
            layers_block_type=["mamba", "moe", "attention", "moe"],
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=WIDTH,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.5,
            mamba_num_heads=4,
            mamba_head_dim=32,
            ssm_state_size=32,
            conv_kernel=4,
            n_groups=1,
            mamba_hidden_act="silu",
            mlp_hidden_act="relu2",
            layer_norm_epsilon=1e-5,
        ),
        moe_layers=(1, 3),
        correction_bias=BIAS_OF_GLM_5_2,
        engine=_HYBRID_ENGINE,
        failure=Failure(
            "is_act_and_mul=False is supported only for",
            "experts without a gate projection need a GPU",
        ),
    ),
    Family(
        "MiMo-V2-Flash",
        _config(
            "MiMoV2FlashForCausalLM",
            "mimo_v2_flash",
            n_routed_experts=EXPERTS,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            moe_layer_freq=[0, 1, 1],
            hybrid_layer_pattern=[0, 0, 0],
            v_head_dim=32,
            swa_head_dim=32,
            swa_v_head_dim=32,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=1,
            sliding_window=64,
            sliding_window_size=64,
            swa_rope_theta=10_000.0,
            attention_bias=False,
            layernorm_epsilon=1e-6,
            add_full_attention_sink_bias=False,
            add_swa_attention_sink_bias=True,
            partial_rotary_factor=1.0,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
    ),
    Family(
        "MiniMax-M2",
        _config(
            "MiniMaxM2ForCausalLM",
            "minimax_m2",
            num_local_experts=EXPERTS,
            scoring_func="sigmoid",
            use_routing_bias=True,
            rotary_dim=32,
            use_qk_norm=True,
            qk_norm_type="per_layer",
            attn_type_list=[1, 1, 1],
        ),
        correction_bias=BIAS_OF_GLM_5_2,
        failure=Failure(
            'assert self.scoring_func == "softmax"',
            "its CPU router knows a sigmoid only with groups",
        ),
    ),
    Family(
        "Phi-3.5-MoE",
        _config(
            "PhiMoEForCausalLM",
            "phimoe",
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            router_jitter_noise=0.01,
            attention_bias=True,
            lm_head_bias=True,
            sliding_window=512,
        ),
        top_k=2,
        renormalizes=False,
        v2=True,
    ),
    Family(
        "Step-3.5",
        _config(
            "Step3p5ForCausalLM",
            "step3p5",
            moe_num_experts=EXPERTS,
            moe_top_k=TOP_K,
            moe_layers_enum="1,2",
            share_expert_dim=WIDTH,
            share_expert_dims=WIDTH,
            moe_router_activation="sigmoid",
            moe_router_scaling_factor=1.0,
            norm_expert_weight=True,
            use_moe_router_bias=True,
            num_attention_groups=1,
            layer_types=["full_attention"] * LAYERS,
            sliding_window=64,
        ),
        moe_layers=(1, 2),
        failure=Failure(
            'assert self.scoring_func == "softmax"',
            "its CPU router knows a sigmoid only with groups",
        ),
    ),
    Family(
        "Jamba",
        _config(
            "JambaForCausalLM",
            "jamba",
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_hidden_layers=4,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        moe_layers=(1, 3),
        top_k=2,
        renormalizes=False,
        engine=_HYBRID_ENGINE,
        failure=Failure("has no attribute 'selective_scan_fwd'", "the Mamba-1 scan needs a GPU"),
    ),
    Family(
        "LongCat-Flash",
        _config(
            "LongcatFlashForCausalLM",
            "longcat_flash",
            num_layers=2,
            num_hidden_layers=4,  # two attentions a layer
            ffn_hidden_size=64,
            expert_ffn_hidden_size=WIDTH,
            n_routed_experts=EXPERTS,
            zero_expert_num=4,
            zero_expert_type="identity",
            moe_topk=TOP_K,
            routed_scaling_factor=1.0,
            norm_topk_prob=False,
            mla_scale_q_lora=True,
            mla_scale_kv_lora=True,
            router_bias=False,
            **(_MLA | {"q_lora_rank": 32}),
        ),
        moe_layers=(0, 1),
        renormalizes=False,
        failure=Failure(
            "has no attribute 'topk_softmax'",
            "its router for zero experts needs a kernel of a GPU",
        ),
    ),
    Family(
        "DeepSeek-V4",
        _config(
            "DeepseekV4ForCausalLM",
            "deepseek_v4",
            dtype="bfloat16",
            num_experts_per_tok=6,
            n_routed_experts=256,
            n_shared_experts=1,
            num_hash_layers=1,
            scoring_func="sqrtsoftplus",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
            head_dim=512,
            qk_rope_head_dim=64,
            q_lora_rank=32,
            o_lora_rank=32,
            o_groups=1,
            compress_ratios=[0, 0, 0],
            sliding_window=64,
            hc_mult=4,
            hc_eps=1e-6,
            hc_sinkhorn_iters=2,
            index_topk=16,
            index_n_heads=2,
            index_head_dim=128,
            swiglu_limit=7.0,
        ),
        correction_bias=BIAS_OF_GLM_5_2,
        hash_layers=(0,),
        num_experts=256,
        top_k=6,
        failure=Failure(
            "'function' object is not subscriptable",
            "its attention needs Triton",
            without_avx512="has no attribute 'convert_weight_packed'",
        ),
    ),
    Family(
        "DBRX",
        {
            "architectures": ["DbrxForCausalLM"],
            "model_type": "dbrx",
            "d_model": HIDDEN,
            "n_heads": 2,
            "n_layers": LAYERS,
            "max_seq_len": 512,
            "vocab_size": VOCABULARY,
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": WIDTH,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
                "moe_normalize_expert_weights": 1.0,
            },
            "dtype": "float32",
        },
    ),
    Family(
        "EXAONE-MoE",
        _config(
            "ExaoneMoeForCausalLM",
            "exaone_moe",
            num_experts=EXPERTS,
            num_shared_experts=1,
            scoring_func="sigmoid",
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
            first_last_k_dense_replace=1,
            is_moe_layer=[False, True, True],
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention"] * LAYERS,
            sliding_window=64,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
    ),
    Family(
        "AFMoE",
        _config(
            "AfmoeForCausalLM",
            "afmoe",
            num_experts=EXPERTS,
            num_shared_experts=1,
            num_dense_layers=1,
            score_func="sigmoid",
            route_norm=True,
            route_scale=1.0,
            n_group=1,
            topk_group=1,
            layer_types=["full_attention"] * LAYERS,
            global_attn_every_n_layers=1,
            sliding_window=64,
            mup_enabled=False,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
    ),
    Family(
        "Cohere2-MoE",
        _config(
            "Cohere2MoeForCausalLM",
            "cohere2_moe",
            num_experts=EXPERTS,
            num_shared_experts=0,
            first_k_dense_replace=0,
            expert_selection_fn="sigmoid",
            norm_topk_prob=True,
            layer_types=["full_attention"] * LAYERS,
            sliding_window=64,
            logit_scale=1.0,
            layer_norm_eps=1e-5,
        ),
    ),
    Family(
        "Granite-MoE-Hybrid",
        _config(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            num_local_experts=EXPERTS,
            shared_intermediate_size=WIDTH,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=32,
            mamba_n_groups=1,
            mamba_d_conv=4,
            mamba_expand=2,
            position_embedding_type="rope",
            embedding_multiplier=1.0,
            attention_multiplier=0.2,
            residual_multiplier=1.0,
            logits_scaling=1.0,
        ),
        engine=_HYBRID_ENGINE,
    ),
    Family(
        "HunYuan-V3",
        _config(
            "HYV3ForCausalLM",
            "hy_v3",
            num_experts=EXPERTS,
            num_shared_experts=1,
            first_k_dense_replace=1,
            expert_hidden_dim=WIDTH,
            moe_router_enable_expert_bias=True,
            moe_router_use_sigmoid=True,
            route_norm=True,
            router_scaling_factor=1.0,
            qk_norm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
    ),
    Family(
        "Laguna",
        _config(
            "LagunaForCausalLM",
            "laguna",
            num_experts=EXPERTS,
            shared_expert_intermediate_size=WIDTH,
            mlp_layer_types=["dense", "sparse", "sparse"],
            mlp_only_layers=[0],
            decoder_sparse_step=1,
            norm_topk_prob=True,
            layer_types=["full_attention"] * LAYERS,
            sliding_window=64,
        ),
        moe_layers=(1, 2),
        correction_bias=BIAS_OF_GLM_5_2,
        failure=Failure(
            'assert self.scoring_func == "softmax"',
            "its CPU router knows a sigmoid only with groups",
        ),
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}
