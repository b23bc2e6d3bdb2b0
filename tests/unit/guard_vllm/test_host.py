"""What of vLLM is refused at start, all of it at once."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from guard_vllm.host import check_host

from guard.errors import UnsupportedHostError
from tests.support.support_recorder import SupportRecord


def config(parallel: dict[str, Any], model: dict[str, Any], rest: dict[str, Any]) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(**{"runner_type": "generate", **model}),
        **{
            "speculative_config": None,
            "kv_transfer_config": None,
            "lora_config": None,
            "scheduler_config": SimpleNamespace(policy="fcfs"),
            **rest,
        },
    )


def drafts(method: str, **rest: Any) -> Any:
    return SimpleNamespace(method=method, **rest)


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle", "mtp"])
def test_drafts_that_the_model_verifies_are_served(method: str) -> None:
    check_host(config({}, {}, {"speculative_config": drafts(method)}))


def test_requests_may_be_scheduled_by_priority() -> None:
    check_host(config({}, {}, {"scheduler_config": SimpleNamespace(policy="priority")}))


def test_a_plain_server_passes() -> None:
    check_host(config({"tensor_parallel_size": 4, "data_parallel_size": 2}, {}, {}))


def test_a_pipeline_passes_on_model_runner_v2() -> None:
    check_host(config({"pipeline_parallel_size": 2}, {}, {"use_v2_model_runner": True}))


@pytest.mark.parametrize(
    ("parallel", "model", "rest", "reason"),
    [
        ({"pipeline_parallel_size": 2}, {}, {}, "pipeline"),
        (
            {"pipeline_parallel_size": 2},
            {},
            {
                "use_v2_model_runner": True,
                "speculative_config": SimpleNamespace(method="ngram"),
            },
            "pipeline of ranks",
        ),
        (
            {"data_parallel_size": 2, "pipeline_parallel_size": 2},
            {},
            {"use_v2_model_runner": True},
            "data parallelism together with pipeline",
        ),
        ({"data_parallel_size": 2, "data_parallel_external_lb": True}, {}, {}, "load balancer"),
        ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, {}, {}, "load balancer"),
        ({"data_parallel_size": 2, "enable_elastic_ep": True}, {}, {}, "--enable-elastic-ep"),
        ({"decode_context_parallel_size": 2}, {}, {}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, {}, {}, "context parallelism"),
        ({"enable_dbo": True}, {}, {}, "dual-batch"),
        ({"use_sequence_parallel_moe": True}, {}, {}, "sequence-parallel experts"),
        ({}, {}, {"lora_config": object()}, "--enable-lora"),
        ({}, {}, {"speculative_config": drafts("dspark")}, "by 'dspark' is not supported"),
        ({}, {}, {"speculative_config": drafts("custom_class")}, "choose one of ngram, "),
        (
            {},
            {},
            {"speculative_config": drafts("mtp", enable_adaptive_verification=True)},
            "adaptive verification",
        ),
        (
            {},
            {},
            {"speculative_config": drafts("eagle3", rejection_sample_method="synthetic")},
            "'synthetic'",
        ),
        ({}, {}, {"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "fast-prefill"),
        ({}, {}, {"weight_transfer_config": object()}, "weight transfer"),
        ({}, {}, {"kv_transfer_config": object()}, "KV connectors"),
        ({}, {"is_diffusion": True}, {}, "diffusion"),
        ({}, {"runner_type": "pooling"}, {}, "pooling"),
        ({}, {"is_encoder_decoder": True}, {}, "encoder-decoder"),
        ({}, {"enable_prompt_embeds": True}, {}, "--enable-prompt-embeds"),
        ({}, {"enable_sleep_mode": True}, {}, "sleep mode"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    parallel: dict[str, Any],
    model: dict[str, Any],
    rest: dict[str, Any],
    reason: str,
    support_record: SupportRecord,
) -> None:
    with pytest.raises(UnsupportedHostError, match=reason) as refused:
        check_host(config(parallel, model, rest))
    if reason in FEATURE_OF:
        told = re.fullmatch(r".*cannot guard this server: (.*)\. Change that.*", str(refused.value))
        assert told
        runner: Literal["v1", "any"] = "v1" if reason == "pipeline" else "any"
        support_record.feature(FEATURE_OF[reason], runner=runner, refused=told[1])


FEATURE_OF = {
    "pipeline": "pipeline parallelism",
    "pipeline of ranks": "speculative decoding in a pipeline",
    "load balancer": "data parallelism: external or hybrid load balancer",
    "--enable-elastic-ep": "data parallelism: elastic (--enable-elastic-ep)",
    "data parallelism together with pipeline": "data parallelism with pipeline parallelism",
    "context parallelism": "context parallelism",
    "dual-batch": "dual-batch overlap (DBO)",
    "sequence-parallel experts": "expert parallelism with tensor and data parallelism",
    "--enable-lora": "LoRA adapters",
    "choose one of ngram, ": "speculative decoding: other drafters",
    "adaptive verification": "adaptive verification of drafts",
    "'synthetic'": "synthetic acceptance of drafts",
    "fast-prefill": "KV sharing in fast prefill",
    "weight transfer": "weight transfer",
    "KV connectors": "KV connectors and offloading",
    "diffusion": "diffusion models",
    "pooling": "pooling models",
    "encoder-decoder": "encoder-decoder models",
    "--enable-prompt-embeds": "prompt embeddings",
    "sleep mode": "sleep mode",
}
"""By a part of the refusal: its name in the support table."""


def test_all_reasons_are_told_together() -> None:
    with pytest.raises(UnsupportedHostError, match=r"pipeline.*; .*sleep mode"):
        check_host(config({"pipeline_parallel_size": 2}, {"enable_sleep_mode": True}, {}))
