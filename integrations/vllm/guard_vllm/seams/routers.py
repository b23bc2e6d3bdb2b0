"""MoE layers: their kernels and routers."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

_MODELS = "vllm.model_executor.models"
_MOE = "vllm.model_executor.layers.fused_moe"

SEAMS: tuple[Seam, ...] = (
    *(
        Seam(f"{_MOE}.oracle.{oracle}", "backend_to_kernel_cls", "passes over what routes inside")
        for oracle in (
            *("unquantized", "fp8", "int8", "int_wna16"),
            *("mxfp4", "nvfp4", "w4a8", "w4a8_int8"),
        )
    ),
    Seam(f"{_MOE}.oracle.mxfp8", "_mxfp8_backend_to_kernel_cls", "passes over what routes inside"),
    Seam(
        f"{_MOE}.modular_kernel",
        "FusedMoEExperts",
        "says that it supports no server, where it routes inside",
        has=("is_monolithic", "is_supported_config"),
    ),
    Seam(
        f"{_MOE}.runner.moe_runner",
        "MoERunner",
        "finds the MoE layers",
        has=("is_monolithic", "layer_id", "layer_name", "routed_experts", "router"),
    ),
    Seam(
        f"{_MOE}.routed_experts",
        "RoutedExperts",
        "whether logits are enough to mask a kernel that routes inside",
        has=(
            "apply_router_weight_on_input",
            "custom_routing_function",
            "e_score_correction_bias",
            "layer_name",
            "moe_config",
            "num_expert_group",
            "quant_method",
            "renormalize",
            "scoring_func",
            "use_grouped_topk",
        ),
    ),
    Seam(
        f"{_MOE}.routed_experts",
        "RoutedExperts._get_quant_method",
        "a layer's kernel is chosen",
    ),
    Seam(
        f"{_MOE}.routed_experts",
        "RoutedExperts.forward_monolithic",
        "tap and masks of a kernel that routes inside: logits in",
        exact=("x", "router_logits", "input_ids"),
    ),
    Seam(
        f"{_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase",
        "which kernel a layer has",
        has=("is_monolithic", "moe_kernel"),
    ),
    Seam(
        f"{_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod",
        "which kernel a layer has, as other quantisations have it",
        has=("experts_cls",),
    ),
    Seam(
        f"{_MOE}.modular_kernel", "FusedMoEKernel", "which kernel a layer has", has=("fused_experts",)
    ),
    Seam(
        f"{_MOE}.config",
        "RoutingMethodType",
        "how a kernel routes",
        has=("Renormalize", "RenormalizeNaive"),
    ),
    Seam(
        f"{_MOE}.runner.moe_runner",
        "MoERunner._maybe_dispatch",
        "masks go with the rows to other engines",
        exact=("hidden_states", "router_logits"),
        returns=2,
    ),
    Seam(
        f"{_MOE}.runner.moe_runner",
        "MoERunner.do_naive_dispatch_combine",
        "whether rows are routed by other engines too",
    ),
    Seam(
        f"{_MOE}.router.base_router",
        "BaseRouter",
        "a layer's routing",
        has=("global_num_experts", "top_k"),
    ),
    Seam(
        f"{_MOE}.router.base_router",
        "BaseRouter._compute_routing",
        "tap and masks: logits in, logical ids out",
        leading=("hidden_states", "router_logits", "indices_type"),
        takes=("input_ids",),
        returns=2,
    ),
    Seam(
        f"{_MOE}.router.fused_topk_router",
        "FusedTopKRouter",
        "plain routing",
        has=("renormalize", "scoring_func"),
    ),
    Seam(
        f"{_MOE}.router.cpu_router",
        "CPURouter",
        "routing on a CPU",
        has=(
            "_hash_indices_table",
            "custom_routing_function",
            "e_score_correction_bias",
            "num_expert_group",
            "renormalize",
            "routed_scaling_factor",
            "scoring_func",
            "topk_group",
            "use_grouped_topk",
        ),
    ),
    Seam(
        f"{_MOE}.router.fused_topk_bias_router",
        "FusedTopKBiasRouter",
        "routing with a bias",
        has=(
            "_hash_indices_table",
            "e_score_correction_bias",
            "renormalize",
            "routed_scaling_factor",
            "scoring_func",
        ),
    ),
    Seam(
        f"{_MOE}.router.fused_topk_bias_router",
        "FusedTopKBiasRouter.bias_vl",
        "a bias of its own for image tokens",
        optional=True,
    ),
    Seam(
        f"{_MOE}.router.fused_topk_bias_router",
        "FusedTopKBiasRouter.image_sentinel_lo",
        "a bias of its own for image tokens",
        optional=True,
    ),
    Seam(
        f"{_MOE}.router.grouped_topk_router",
        "GroupedTopKRouter",
        "routing by groups",
        has=(
            "e_score_correction_bias",
            "num_expert_group",
            "renormalize",
            "routed_scaling_factor",
            "scoring_func",
            "topk_group",
        ),
    ),
    Seam(
        f"{_MOE}.router.zero_expert_router",
        "ZeroExpertRouter",
        "routing with zero experts",
        has=(
            "_zero_expert_output",
            "e_score_correction_bias",
            "renormalize",
            "routed_scaling_factor",
            "scoring_func",
            "zero_expert_type",
        ),
    ),
    Seam(
        f"{_MOE}.router.custom_routing_router",
        "CustomRoutingRouter",
        "routing by a model's own function",
        has=("custom_routing_function", "renormalize"),
    ),
    Seam(
        f"{_MOE}.router.aiter_shared_routed_fused_moe_router",
        "AiterSharedRoutedFusedMoERouter",
        "plain routing, on AMD",
        has=("renormalize", "scoring_func"),
    ),
    Seam(f"{_MOE}.router.routing_simulator_router", "RoutingSimulatorRouter", "refused"),
    Seam(
        f"{_MOE}.config",
        "FusedMoEConfig",
        "experts without copies, and how the kernel routes",
        has=(
            "has_hash_routing",
            "moe_parallel_config",
            "num_experts",
            "num_logical_experts",
            "routing_method",
        ),
    ),
    Seam(
        f"{_MOE}.config",
        "FusedMoEParallelConfig",
        "whose rows a kernel sees",
        has=("dp_size", "enable_eplb", "is_sequence_parallel", "use_ep"),
    ),
    Seam(f"{_MODELS}.cohere2_moe", "token_choice_with_bias", "a known routing", optional=True),
    Seam(f"{_MODELS}.gemma4", "Gemma4Router.routing_function", "a known routing", optional=True),
    Seam(f"{_MODELS}.gemma4", "Gemma4Router.per_expert_scale", "of that routing", optional=True),
    Seam(
        f"{_MODELS}.interns1_pro",
        "InternS1ProMoeSparseMoeBlock._custom_routing_function",
        "a known routing",
        optional=True,
    ),
    Seam(
        f"{_MODELS}.interns1_pro",
        "InternS1ProMoeSparseMoeBlock",
        "of that routing",
        has=("n_groups",),
        optional=True,
    ),
    Seam(f"{_MODELS}.llama4", "Llama4MoE.custom_routing_function", "a known routing"),
    Seam(f"{_MODELS}.phimoe", "phimoe_routing_function", "a known routing", optional=True),
)
