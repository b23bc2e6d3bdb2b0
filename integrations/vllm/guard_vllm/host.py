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
    parallel, model = config.parallel_config, config.model_config

    def unless(fine: bool, reason: str) -> str | None:
        return None if fine else reason

    def size(name: str) -> int:
        return int(getattr(parallel, name, 1) or 1)

    return [
        unless(size("pipeline_parallel_size") == 1, "pipeline parallelism is not supported yet"),
        unless(size("data_parallel_size") == 1, "data parallelism is not supported yet"),
        unless(
            size("decode_context_parallel_size") == 1 and size("prefill_context_parallel_size") == 1,
            "context parallelism is not supported yet",
        ),
        unless(not getattr(parallel, "enable_dbo", False), "dual-batch overlap is not supported yet"),
        unless(
            not getattr(parallel, "enable_eplb", False),
            "expert load balancing (--enable-eplb) is not supported yet",
        ),
        unless(
            not getattr(parallel, "enable_expert_parallel", False),
            "expert parallelism (--enable-expert-parallel) is not supported yet",
        ),
        unless(
            config.scheduler_config.policy == "fcfs",
            "scheduling by priority is not supported yet: it can leave more requests preempted than "
            "the guard has slots for",
        ),
        unless(not getattr(model, "is_diffusion", False), "diffusion models are not supported yet"),
        unless(config.lora_config is None, "LoRA adapters (--enable-lora) are not supported yet"),
        unless(config.speculative_config is None, "speculative decoding is not supported yet"),
        unless(
            config.kv_transfer_config is None,
            "KV connectors are not supported yet: they bring KV that was never routed here",
        ),
        unless(model.runner_type == "generate", "only text generation is supported, not pooling"),
        unless(
            not getattr(model, "is_encoder_decoder", False),
            "encoder-decoder models are not supported",
        ),
        unless(
            not getattr(model, "enable_prompt_embeds", False),
            "prompt embeddings (--enable-prompt-embeds) are not supported yet",
        ),
        unless(
            not getattr(model, "enable_sleep_mode", False),
            "sleep mode is not supported yet: the proof would have to be repeated",
        ),
    ]
