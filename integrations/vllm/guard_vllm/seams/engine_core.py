"""The engine core: requests, KV blocks, messages to the API servers."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

SEAMS: tuple[Seam, ...] = (
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
)
