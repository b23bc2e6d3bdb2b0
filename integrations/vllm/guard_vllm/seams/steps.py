"""A step: the model runners, what the scheduler sends them and what comes back."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"

SEAMS: tuple[Seam, ...] = (
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
        has=(
            "block_ids",
            "lora_request",
            "num_computed_tokens",
            "prompt_token_ids",
            "req_id",
            "sampling_params",
        ),
    ),
    Seam(
        "vllm.v1.core.sched.output",
        "CachedRequestData",
        "requests that go on after preemption",
        has=("new_block_ids", "num_computed_tokens", "req_ids", "resumed_req_ids"),
    ),
    Seam("vllm.lora.request", "LoRARequest", "which adapter a request uses", has=("lora_name",)),
    Seam(
        "vllm.sampling_params",
        "SamplingParams",
        "what a caller asks",
        has=("extra_args", "max_tokens", "n", "stop", "temperature"),
    ),
    Seam("vllm.v1.outputs", "ModelRunnerOutput", "carries the report"),
    Seam("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", "carries the report"),
    Seam("vllm.v1.outputs", "AsyncModelRunnerOutput", "an output on its way"),
)
