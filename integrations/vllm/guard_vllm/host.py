"""What of vLLM the guard cannot watch truthfully yet: refused at start, with the reason."""

from __future__ import annotations

from typing import Any

from guard.errors import UnsupportedHostError


def check_host(config: Any) -> None:
    """Raises UnsupportedHostError with everything in a VllmConfig that stands in the way."""
    refusals = [reason for reason in _reasons(config) if reason is not None]
    if refusals:
        raise UnsupportedHostError(
            "MoE Guard cannot guard this server: " + "; ".join(refusals) + ". Change that, or start "
            "without MoE Guard's policies"
        )


def _reasons(config: Any) -> list[str | None]:
    parallel = config.parallel_config

    def unless(fine: bool, reason: str) -> str | None:
        return None if fine else reason

    def size(name: str) -> int:
        return int(getattr(parallel, name, 1) or 1)

    return [
        unless(
            size("pipeline_parallel_size") == 1 or bool(getattr(config, "use_v2_model_runner", False)),
            "pipeline parallelism needs Model Runner V2, whose ranks can pass evidence on; set "
            "VLLM_USE_V2_MODEL_RUNNER=1",
        ),
        unless(
            size("pipeline_parallel_size") == 1 or config.speculative_config is None,
            "speculative decoding in a pipeline of ranks is not supported yet",
        ),
        unless(
            size("data_parallel_size") == 1 or size("pipeline_parallel_size") == 1,
            "data parallelism together with pipeline parallelism is not supported yet",
        ),
        unless(
            not (
                getattr(parallel, "data_parallel_external_lb", False)
                or getattr(parallel, "data_parallel_hybrid_lb", False)
            ),
            "data parallelism with an external or hybrid load balancer is not supported yet: let "
            "vLLM's own API servers balance it",
        ),
        unless(
            not getattr(parallel, "enable_elastic_ep", False),
            "engines that come and go (--enable-elastic-ep) are not supported: each start would have "
            "to be proved",
        ),
        unless(
            size("decode_context_parallel_size") == 1 and size("prefill_context_parallel_size") == 1,
            "context parallelism is not supported yet",
        ),
        unless(
            not getattr(parallel, "enable_dbo", False) and size("ubatch_size") <= 1,
            "dual-batch overlap (--enable-dbo, or --ubatch-size above 1) is not supported yet: a layer "
            "sees a step in parts",
        ),
        unless(
            not getattr(parallel, "enable_batch_sharded_sampling", False),
            "sampling in shards (--enable-batch-sharded-sampling) is not supported yet: a rank samples "
            "for some requests of a step only",
        ),
        unless(
            not getattr(parallel, "use_sequence_parallel_moe", False),
            "expert parallelism together with tensor and data parallelism is not supported yet: it "
            "splits a step's rows over the tensor-parallel ranks (sequence-parallel experts); set "
            "--tensor-parallel-size 1",
        ),
        *_serving_reasons(config),
    ]


JUDGED_DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa")
"""Ways to speculate whose drafts the target model verifies, one token of the output after the other."""


def _serving_reasons(config: Any) -> list[str | None]:
    model, drafts = config.model_config, config.speculative_config

    def has(owner: Any, name: str) -> bool:
        return bool(getattr(owner, name, None))

    def when(bad: bool, reason: str) -> str | None:
        return reason if bad else None

    method = getattr(drafts, "method", None)
    return [
        when(
            drafts is not None and method not in JUDGED_DRAFTS,
            f"speculative decoding by {method!r} is not supported; choose one of "
            + ", ".join(JUDGED_DRAFTS),
        ),
        when(
            has(drafts, "enable_adaptive_verification"),
            "adaptive verification of drafts (enable_adaptive_verification) is not supported: the host "
            "does not know how many drafts of a step are verified",
        ),
        when(
            getattr(drafts, "rejection_sample_method", "standard") == "synthetic",
            "rejection_sample_method 'synthetic' is not supported: it accepts drafts that the model "
            "would not have said",
        ),
        when(has(model, "is_diffusion"), "diffusion models are not supported yet"),
        when(
            config.lora_config is not None,
            "LoRA adapters (--enable-lora) are not supported yet: an adapter changes what experts "
            "mean, and the proof covers the base model alone",
        ),
        when(
            config.kv_transfer_config is not None,
            "KV connectors and offloading are not supported yet: they bring KV that was never routed "
            "here",
        ),
        when(
            has(getattr(config, "cache_config", None), "kv_sharing_fast_prefill"),
            "--kv-sharing-fast-prefill is not supported: later layers compute fewer rows than earlier "
            "ones",
        ),
        when(model.runner_type != "generate", "only text generation is supported, not pooling"),
        when(has(model, "is_encoder_decoder"), "encoder-decoder models are not supported"),
        when(
            has(model, "enable_prompt_embeds"),
            "prompt embeddings (--enable-prompt-embeds) are not supported yet: such prompts have no "
            "tokens to cache or to count by",
        ),
        when(
            has(model, "enable_sleep_mode"),
            "sleep mode is not supported yet: the proof would have to be repeated",
        ),
        when(
            getattr(config, "weight_transfer_config", None) is not None,
            "weight transfer (--weight-transfer-config) is not supported: new weights have not been "
            "proved",
        ),
    ]
