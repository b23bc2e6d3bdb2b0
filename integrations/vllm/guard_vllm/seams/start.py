"""What starts a guarded server: config, engine, worker."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

SEAMS: tuple[Seam, ...] = (
    # What starts: config, engine, worker.
    Seam("vllm.version", "__version__", "names the version in errors"),
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "checks policies and host",
        leading=("usage_context",),
    ),
    Seam("vllm.v1.worker.worker_base", "WorkerBase.__init__", "the guard hangs on it"),
    Seam("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", "workers are up, no scheduler yet"),
    Seam("vllm.v1.engine.llm_engine", "LLMEngine.__init__", "opens the bus", leading=("vllm_config",)),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.__init__", "opens the bus", leading=("vllm_config",)),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks", "asked before it serves"),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", "its watch of the policies ends"),
    Seam("vllm.usage.usage_lib", "UsageContext.OPENAI_API_SERVER", "which processes take SIGHUP"),
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
)
