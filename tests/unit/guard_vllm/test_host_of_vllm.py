"""What vLLM's own configurations turn on in ways that no flag of the same name shows is refused too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.host import check_host
from vllm.config import CacheConfig, ParallelConfig, VllmConfig

from guard.errors import UnsupportedHostError


def refusal(parallel: ParallelConfig | None = None, **rest: Any) -> str:
    """What is said of a server with these parts of vLLM's configuration; empty if it passes."""
    config = SimpleNamespace(
        parallel_config=ParallelConfig() if parallel is None else parallel,
        model_config=SimpleNamespace(runner_type="generate"),
        **{"speculative_config": None, "kv_transfer_config": None, "lora_config": None, **rest},
    )
    try:
        check_host(config)
    except UnsupportedHostError as error:
        return str(error)
    return ""


def test_what_vllm_takes_without_any_flag_passes() -> None:
    assert refusal() == ""


@pytest.mark.parametrize("options", [{"ubatch_size": 2}, {"ubatch_size": 4}, {"enable_dbo": True}])
def test_batches_in_parts_are_refused_however_they_are_asked_for(options: dict[str, Any]) -> None:
    parallel = ParallelConfig(**options)
    assert parallel.use_ubatching

    assert "--ubatch-size above 1" in refusal(parallel)


def test_one_part_is_no_part() -> None:
    parallel = ParallelConfig(ubatch_size=1)
    assert not parallel.use_ubatching

    assert refusal(parallel) == ""


@pytest.mark.parametrize(
    "backend",
    ["allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "nixl_ep"],
)
def test_sequence_parallel_experts_are_refused_by_what_turns_them_on(backend: str) -> None:
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    parallel = ParallelConfig(enable_expert_parallel=True, all2all_backend=backend, **sizes)
    assert parallel.use_sequence_parallel_moe

    assert "expert parallelism" in refusal(parallel)


def test_sampling_in_shards_is_refused() -> None:
    sharded = ParallelConfig(tensor_parallel_size=2, enable_batch_sharded_sampling=True)

    assert "--enable-batch-sharded-sampling" in refusal(sharded)
    assert refusal(ParallelConfig(tensor_parallel_size=2)) == ""


def test_kv_that_is_offloaded_is_refused_though_no_connector_is_named() -> None:
    config = VllmConfig(cache_config=CacheConfig(kv_offloading_size=1.0))

    assert "KV connectors and offloading" in refusal(kv_transfer_config=config.kv_transfer_config)
