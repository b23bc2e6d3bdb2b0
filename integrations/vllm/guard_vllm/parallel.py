"""The groups of ranks that a guard's worker belongs to."""

from __future__ import annotations

import os
from typing import Any

from guard.runtime import Guard
from guard_vllm.compat import seam


def agree_on_tensor_parallel_ranks(guard: Guard) -> None:
    """Tensor-parallel ranks route the same rows, each by itself; only the first one's word reaches
    the engine core. On the group that also carries the layers' sums: the same order of collectives
    on every rank, and no traffic at all without tensor parallelism."""
    group = seam("vllm.distributed.parallel_state", "get_tp_group")()
    if group.world_size > 1:
        guard.agree_with(group.device_group)


def is_first_of_tensor_parallel() -> bool:
    """Of ranks that route the same rows one speaks for all."""
    rank: int = seam("vllm.distributed.parallel_state", "get_tp_group")().rank_in_group
    return rank == 0


def reports_for_all(parallel_config: Any) -> bool:
    """Under an external launcher each rank has an engine core of its own, in which the same is decided:
    the first rank of a replica tells it."""
    if parallel_config.distributed_executor_backend != "external_launcher":
        return True
    # There vLLM counts the ranks of all replicas in.
    ranks = int(parallel_config.world_size) // int(parallel_config.data_parallel_size)
    return int(os.environ["RANK"]) % ranks == 0
