"""What the plugin relies on in vLLM: the table of private names, which `compat` looks up for it.

To use another name of vLLM, add one line to `SEAMS`:

    Seam("vllm.v1.engine.core", "EngineCore.post_step", "sends events", leading=("model_executed",)),

and, where it was not in every supported version or the plugin does without it, `since="0.28"` or
`optional=True`. A class or module of which only attributes are read has them in `has=(...)`. Then
`make seams` checks it in the published versions and rewrites docs/vllm-versions.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of vLLM and what is relied on.

    module, name: dotted module, and the qualified name in it ("" for the module itself)
    why: what the plugin does there
    leading: a function's first parameters in this order, without self: they come by position
    takes: parameters that are passed or read by name, at whatever position
    exact: all parameters, where the plugin puts a function of its own signature in its place
    has: attributes of a class, its instances or a module: methods, fields, enum members
    returns: how many values the returned tuple has
    since: the first version that has it; the plugin does without in those before
    optional: the plugin does without wherever it is absent, but what is there must be as said
    """

    module: str
    name: str
    why: str
    leading: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    exact: tuple[str, ...] | None = None
    has: tuple[str, ...] = ()
    returns: int = 0
    since: str = ""
    optional: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}:{self.name}" if self.name else self.module

    @property
    def attribute(self) -> str:
        """The last part of the name: what is looked up on its owner."""
        return self.name.rpartition(".")[2]


_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
_OPENAI = "vllm.entrypoints.openai"
_MODELS = "vllm.model_executor.models"
_MOE = "vllm.model_executor.layers.fused_moe"

SEAMS: tuple[Seam, ...] = (
    # What starts: config, engine, worker.
    Seam("vllm.version", "__version__", "names the version in errors"),
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "checks policies and host"),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.__init__", "the guard hangs on it"),
    Seam("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", "workers are up, no scheduler yet"),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.__init__", "opens the bus", leading=("vllm_config",)),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.__init__", "opens the bus", leading=("vllm_config",)),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks", "asked before it serves"),
    # Configuration.
    Seam(
        "vllm.config.vllm",
        "VllmConfig",
        "what the server is",
        has=(
            "additional_config",
            "cache_config",
            "compilation_config",
            "kv_transfer_config",
            "lora_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Seam(
        "vllm.config.vllm",
        "VllmConfig.weight_transfer_config",
        "no weights from elsewhere",
        optional=True,
    ),
    Seam(
        "vllm.config.cache",
        "CacheConfig.kv_sharing_fast_prefill",
        "no prefill that leaves rows out",
        optional=True,
    ),
    Seam(
        "vllm.config.speculative",
        "SpeculativeConfig",
        "drafts that are verified",
        has=("method", "num_speculative_tokens"),
    ),
    Seam(
        "vllm.config.speculative",
        "SpeculativeConfig.enable_adaptive_verification",
        "every draft is verified",
        optional=True,
    ),
    Seam(
        "vllm.config.speculative",
        "SpeculativeConfig.rejection_sample_method",
        "verified in earnest",
        optional=True,
    ),
    Seam("vllm.config.vllm", "VllmConfig.compute_hash", "compile key with additional_config"),
    Seam(
        "vllm.config.model",
        "ModelConfig",
        "which model, and what of it is refused",
        has=(
            "enable_prompt_embeds",
            "enable_sleep_mode",
            "hf_config",
            "is_diffusion",
            "is_encoder_decoder",
            "runner_type",
            "served_model_name",
        ),
    ),
    Seam(
        "vllm.config.parallel",
        "ParallelConfig",
        "layouts that are handled or refused",
        has=(
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_rank",
            "data_parallel_size",
            "decode_context_parallel_size",
            "distributed_executor_backend",
            "enable_dbo",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
            "ubatch_size",
            "use_sequence_parallel_moe",
            "world_size",
        ),
    ),
    Seam(
        "vllm.config.parallel",
        "ParallelConfig.enable_elastic_ep",
        "no engines that come and go",
        optional=True,
    ),
    Seam(
        "vllm.config.parallel",
        "ParallelConfig.enable_batch_sharded_sampling",
        "every rank samples the whole step",
        optional=True,
    ),
    Seam(
        "vllm.config.scheduler",
        "SchedulerConfig",
        "sizes of the guard's buffers",
        has=("max_num_batched_tokens", "max_num_seqs", "policy"),
    ),
    Seam(
        "vllm.config.compilation",
        "CompilationConfig",
        "the largest captured graph",
        has=("cudagraph_capture_sizes",),
    ),
    # The worker.
    Seam(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        "the guard of a worker",
        has=("device", "model_config", "model_runner", "use_v2_model_runner", "vllm_config"),
    ),
    Seam("vllm.v1.worker.gpu_worker", "Worker.load_model", "attaches to the loaded model"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "proves and arms"),
    Seam("vllm.v1.worker.cpu_worker", "CPUWorker.compile_or_warm_up_model", "proves and arms"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.reload_weights", "proves new weights"),
    Seam("vllm.v1.worker.gpu_worker", "Worker.determine_available_memory", "room for evidence"),
    Seam("vllm.v1.worker.cpu_worker", "CPUWorker.determine_available_memory", "room for evidence"),
    # Model runners. V1:
    Seam(
        _V1_RUNNER,
        "GPUModelRunner",
        "rows of a step",
        has=("input_batch", "kv_cache_config", "positions", "query_start_loc"),
    ),
    Seam(_V1_RUNNER, "GPUModelRunner.get_model", "where the routers are"),
    Seam(_V1_RUNNER, "GPUModelRunner.get_kv_cache_spec", "room for evidence"),
    Seam(_V1_RUNNER, "GPUModelRunner.execute_model", "admits", leading=("scheduler_output",)),
    Seam(_V1_RUNNER, "GPUModelRunner.sample_tokens", "the output that carries the report"),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner._dummy_run",
        "probe rows; counts nothing",
        leading=("num_tokens",),
        takes=("uniform_decode",),
    ),
    Seam(_V1_RUNNER, "GPUModelRunner._prepare_inputs", "rows are known", leading=("scheduler_output",)),
    Seam(_V1_RUNNER, "GPUModelRunner._sample", "end of a step"),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner._prepare_padding_mask",
        "probe rows are no padding; before, V1 marked none",
        optional=True,
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        "rows of V1",
        has=("block_table", "num_reqs", "req_ids", "vocab_size"),
    ),
    Seam("vllm.v1.worker.block_table", "BlockTable", "where rows' KV goes", has=("slot_mapping",)),
    Seam(
        "vllm.v1.spec_decode.metadata",
        "SpecDecodeMetadata",
        "drafts of a step",
        has=("cu_num_draft_tokens",),
    ),
    Seam("vllm.v1.outputs", "SamplerOutput", "accepted drafts", has=("sampled_token_ids",)),
    # V2:
    Seam(_V2_RUNNER, "GPUModelRunner.get_model", "where the routers are"),
    Seam(_V2_RUNNER, "GPUModelRunner.get_kv_cache_spec", "room for evidence"),
    Seam(_V2_RUNNER, "GPUModelRunner", "the KV cache", has=("kv_cache_config",)),
    Seam(_V2_RUNNER, "GPUModelRunner.prepare_attn", "where rows' KV goes", returns=2),
    Seam(
        _V2_RUNNER,
        "GPUModelRunner.execute_model",
        "admits",
        leading=("scheduler_output",),
        takes=("dummy_run",),
    ),
    Seam(_V2_RUNNER, "GPUModelRunner.sample_tokens", "the output that carries the report"),
    Seam(
        _V2_RUNNER,
        "GPUModelRunner._dummy_run",
        "probe rows; counts nothing",
        leading=("num_tokens",),
        takes=("uniform_decode",),
    ),
    Seam(_V2_RUNNER, "GPUModelRunner.prepare_inputs", "rows are known", leading=("scheduler_output",)),
    Seam(_V2_RUNNER, "GPUModelRunner.sample", "end of a step", returns=3),
    Seam(_V2_RUNNER, "InputBatch", "the class that makes dummy batches"),
    Seam(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "rows of V2",
        has=(
            "is_padding",
            "num_computed_tokens_np",
            "num_reqs",
            "num_scheduled_tokens",
            "num_tokens",
            "positions",
            "prefill_len_np",
            "query_start_loc",
            "req_ids",
        ),
    ),
    Seam("vllm.v1.worker.gpu.input_batch", "InputBatch.make_dummy", "probe rows are no padding"),
    # What the scheduler sends, and what comes back.
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "who comes and goes",
        has=(
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
            "total_num_scheduled_tokens",
        ),
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput.kv_cache_block_copies",
        "evidence is copied with blocks",
        optional=True,
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "a request's slot",
        has=("block_ids", "num_computed_tokens", "prompt_token_ids", "req_id", "sampling_params"),
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        "requests that go on after preemption",
        has=("new_block_ids", "num_computed_tokens", "req_ids", "resumed_req_ids"),
    ),
    Seam(
        "vllm.sampling_params", "SamplingParams", "what a caller asks", has=("extra_args", "n", "stop")
    ),
    Seam("vllm.v1.outputs", "ModelRunnerOutput", "carries the report"),
    Seam("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", "carries the report"),
    Seam("vllm.v1.outputs", "AsyncModelRunnerOutput", "an output on its way"),
    # The engine core.
    Seam(
        "vllm.v1.engine.core",
        "EngineCore",
        "the ledger",
        has=("model_executor", "scheduler", "vllm_config"),
    ),
    Seam("vllm.v1.engine.core", "EngineCore.add_request", "hooks the scheduler", leading=("request",)),
    Seam("vllm.v1.engine.core", "EngineCore.post_step", "sends events"),
    Seam(
        "vllm.v1.engine.core",
        "EngineCoreProc",
        "the socket to the API servers",
        has=("addresses", "engine_index", "output_queue"),
    ),
    Seam("vllm.v1.engine.utils", "EngineZmqAddresses", "which API servers", has=("outputs",)),
    Seam("vllm.v1.executor.abstract", "Executor.collective_rpc", "asks workers", leading=("method",)),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "which requests are running",
        has=(
            "connector",
            "has_unfinished_requests",
            "hash_block_size",
            "kv_cache_manager",
            "requests",
        ),
    ),
    Seam("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "tells workers of KV blocks"),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        "takes the report",
        exact=("scheduler_output", "model_runner_output"),
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._update_request_with_output",
        "ends a blocked request",
        leading=("request", "new_token_ids"),
        returns=2,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._free_request",
        "a request ends",
        leading=("request",),
    ),
    Seam(
        "vllm.v1.request",
        "Request",
        "blocked, isolated, judged",
        has=(
            "block_hashes",
            "is_finished",
            "num_computed_tokens",
            "num_prompt_tokens",
            "num_tokens",
            "request_id",
            "resumable",
            "sampling_params",
            "skip_reading_prefix_cache",
            "status",
            "stop_reason",
            "update_block_hashes",
        ),
    ),
    Seam("vllm.v1.request", "RequestStatus", "a blocked request is stopped", has=("FINISHED_STOPPED",)),
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "KV of masked positions is kept apart",
        exact=("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        returns=2,
    ),
    # KV blocks.
    Seam(
        "vllm.config.cache",
        "CacheConfig",
        "whether prefixes come from a cache",
        has=("enable_prefix_caching", "kv_cache_memory_bytes"),
    ),
    Seam(
        "vllm.v1.kv_cache_interface",
        "KVCacheConfig",
        "the blocks that carry evidence",
        has=("kv_cache_groups", "num_blocks"),
    ),
    Seam("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "a group", has=("kv_cache_spec",)),
    Seam(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec",
        "a group that holds all tokens",
        has=("block_size", "page_size_bytes"),
    ),
    Seam("vllm.v1.kv_cache_interface", "UniformTypeKVCacheSpecs", "layers", has=("kv_cache_specs",)),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        "which blocks are found",
        has=(
            "block_pool",
            "coordinator",
            "create_kv_cache_blocks",
            "evict_blocks",
            "num_kv_cache_groups",
        ),
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.get_computed_blocks",
        "a request takes only what was seen",
        leading=("request",),
        returns=3,
    ),
    Seam(
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.find_longest_cache_hit",
        "a shorter hit",
        leading=("block_hashes", "max_cache_hit_length"),
    ),
    Seam("vllm.v1.core.block_pool", "BlockPool", "cached blocks", has=("get_cached_block",)),
    Seam("vllm.v1.core.block_pool", "BlockPool.get_new_blocks", "blocks change hands"),
    Seam(
        "vllm.v1.core.block_pool",
        "BlockPool.cache_full_blocks",
        "blocks that can be found",
        leading=(
            "request",
            "blocks",
            "num_cached_blocks",
            "num_full_blocks",
            "block_size",
            "kv_cache_group_id",
        ),
    ),
    # Messages to the API servers.
    Seam("vllm.v1.engine", "EngineCoreOutputs", "a message", has=("engine_index", "utility_output")),
    Seam("vllm.v1.engine", "UtilityOutput", "a message", has=("call_id", "result")),
    Seam("vllm.v1.serial_utils", "UtilityResult.__init__", "a message's body", exact=("r",)),
    Seam("vllm.v1.serial_utils", "UtilityResult", "a message's body", has=("result",)),
    Seam(
        "vllm.v1.engine.core_client",
        "_process_utility_output",
        "receives messages",
        exact=("output", "utility_results"),
    ),
    Seam(
        "vllm.v1.engine.core_client",
        "MPClient.engine_ranks_managed",
        "every engine must greet",
    ),
    # Routers.
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
        has=("dp_size", "enable_eplb", "is_sequence_parallel"),
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
    # Ranks.
    Seam("vllm.distributed.parallel_state", "get_tp_group", "ranks agree on a verdict"),
    Seam("vllm.distributed.parallel_state", "get_pp_group", "ranks of a pipeline share evidence"),
    Seam("vllm.distributed.parallel_state", "get_dp_group", "which rows are this engine's"),
    Seam("vllm.distributed.parallel_state", "get_ep_group", "masks go with the rows"),
    Seam(
        "vllm.distributed.parallel_state",
        "GroupCoordinator.dispatch_router_logits",
        "masks go with the rows",
        leading=("hidden_states", "router_logits"),
        takes=("extra_tensors",),
    ),
    Seam("vllm.forward_context", "get_forward_context", "which rows are this engine's"),
    Seam(
        "vllm.forward_context",
        "DPMetadata.get_chunk_sizes_across_dp_rank",
        "which rows are this engine's",
    ),
    Seam(
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        "ranks agree on a verdict, and share evidence",
        has=("cpu_group", "device_group", "rank_in_group", "world_size"),
    ),
    Seam(
        "vllm.distributed.parallel_state",
        "GroupCoordinator.make_sibling_device_group",
        "what the guard sends waits for no hidden states",
        takes=("group_desc",),
    ),
    Seam(
        "vllm.sequence",
        "IntermediateTensors",
        "evidence goes on with the hidden states",
        has=("tensors",),
    ),
    # The front end.
    Seam(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        "content_filter",
    ),
    Seam(
        "vllm.v1.engine.output_processor",
        "RequestState.make_request_output",
        "keeps the last text",
        takes=("new_token_ids", "stop_reason"),
    ),
    Seam(
        "vllm.v1.engine.output_processor", "RequestState", "keeps the last text", has=("detokenizer",)
    ),
    Seam(
        "vllm.v1.engine.detokenizer",
        "BaseIncrementalDetokenizer",
        "keeps the last text",
        has=("decode_next", "include_stop_str_in_output", "output_text"),
    ),
    Seam(
        "vllm.outputs",
        "CompletionOutput",
        "how a choice ended",
        has=("finish_reason", "index", "stop_reason"),
    ),
    Seam("vllm.outputs", "RequestOutput", "how a request ended", has=("outputs",)),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "checks what a caller asks",
        takes=("prompt", "sampling_params"),
    ),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "checks what a caller asks",
        takes=("params",),
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        "refuses beam search",
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.offline",
        "BeamSearchOfflineMixin.beam_search",
        "refuses beam search",
    ),
    Seam(
        "vllm.entrypoints.launchers.grpc_server",
        "",
        "tells that gRPC was asked for, by being imported",
        optional=True,
    ),
    Seam(
        "vllm.entrypoints.grpc_server",
        "",
        "tells that gRPC was asked for, by being imported",
        optional=True,
    ),
    Seam(
        f"{_OPENAI}.completion.serving",
        "OpenAIServingCompletion.completion_stream_generator",
        "ends a blocked stream",
        takes=("request", "result_generator", "request_id", "created_time", "model_name"),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        "refusal",
    ),
    Seam(
        f"{_OPENAI}.chat_completion.serving",
        "OpenAIServingChat.chat_completion_stream_generator",
        "refusal, streamed",
        takes=("result_generator",),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.batch_serving",
        "OpenAIServingChatBatch.chat_completion_full_generator_batch",
        "refusal",
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionResponse",
        "refusal",
        has=("choices",),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionResponseChoice",
        "refusal",
        has=("finish_reason", "message", "stop_reason"),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol", "ChatMessage", "refusal", has=("refusal", "tool_calls")
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses._generate_with_builtin_tools",
        "checks what a caller asks",
        takes=("sampling_params",),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_full_generator",
        "incomplete",
        takes=("context",),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_stream_generator",
        "incomplete, streamed",
        takes=("context",),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_background_stream_generator",
        "incomplete, in the background",
    ),
    Seam(
        f"{_OPENAI}.responses.context",
        "ParsableContext.need_builtin_tool_call",
        "no tool after a block",
        exact=(),
    ),
    Seam(
        f"{_OPENAI}.responses.context",
        "HarmonyContext.need_builtin_tool_call",
        "no tool after a block",
        exact=(),
    ),
    Seam(f"{_OPENAI}.responses.context", "ParsableContext", "how it ended", has=("finish_reason",)),
    Seam(f"{_OPENAI}.responses.context", "HarmonyContext", "how it ended", has=("finish_reason",)),
    Seam(f"{_OPENAI}.responses.context", "SimpleContext", "how it ended", has=("last_output",)),
    Seam(f"{_OPENAI}.responses.protocol", "IncompleteDetails", "incomplete"),
    Seam(
        f"{_OPENAI}.responses.protocol",
        "ResponsesResponse",
        "incomplete",
        has=("incomplete_details", "output", "status"),
    ),
    Seam("vllm.entrypoints.anthropic.protocol", "AnthropicDelta", "refusal", has=("stop_reason",)),
    Seam(
        "vllm.entrypoints.anthropic.protocol",
        "AnthropicMessagesResponse",
        "refusal",
        has=("stop_reason",),
    ),
    Seam("vllm.entrypoints.anthropic.protocol", "AnthropicStreamEvent", "refusal"),
    Seam(
        "vllm.entrypoints.anthropic.serving",
        "_to_anthropic_stop_reason",
        "refusal",
        takes=("finish_reason",),
        returns=2,
    ),
    Seam("vllm.entrypoints.cohere.serving", "_FINISH_REASON_MAP", "ERROR, for want of a word"),
    Seam("vllm.renderers.online_derenderer", "OnlineDerenderer.derender_chat", "refusal, from tokens"),
    Seam(
        "vllm.renderers.online_derenderer",
        "OnlineDerenderer.derender_chat_stream",
        "refusal, from tokens",
        returns=2,
    ),
)
