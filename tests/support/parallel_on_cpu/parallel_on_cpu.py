"""Data and expert parallelism on a CPU, for tests only: a vLLM plugin of this folder on PYTHONPATH.

vLLM's CPU communicator lacks the two collectives with which engines exchange the rows of a MoE layer,
and its CPU kernel reads beyond its weights where a row's expert lies on another rank. The stand-ins
here are slow and simple; routers, masks and maps of experts stay vLLM's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv
    CPUUnquantizedExperts.apply = _of_local_experts(CPUUnquantizedExperts.apply)


def _all_gatherv(
    communicator: Any, given: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Any = None
) -> torch.Tensor | list[torch.Tensor]:
    """Each rank's rows behind one another; `sizes` says how many each has."""
    assert dim == 0
    if isinstance(given, list):
        return [_gathered(communicator, tensor, sizes) for tensor in given]
    return _gathered(communicator, given, sizes)


def _gathered(communicator: Any, rows: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    sizes = sizes or [len(rows)] * communicator.world_size
    sent = rows.new_zeros((max(sizes), *rows.shape[1:]))
    sent[: len(rows)] = rows
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=communicator.device_group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def _reduce_scatterv(
    communicator: Any, rows: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over ranks."""
    assert dim == 0
    world_size, rank = communicator.world_size, communicator.rank_in_group
    sizes = sizes or [len(rows) // world_size] * world_size
    total = rows.clone()
    dist.all_reduce(total, group=communicator.device_group)
    first = sum(sizes[:rank])
    return total[first : first + sizes[rank]].clone()


def _of_local_experts(stock: Any) -> Any:
    """Experts of other ranks become this rank's first one without weight: they add nothing here."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def apply(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        expert_map = given.arguments["expert_map"]
        if expert_map is not None:
            ids, weights = given.arguments["topk_ids"], given.arguments["topk_weights"]
            local_ids = expert_map[ids.long()].to(ids.dtype)
            given.arguments["topk_ids"] = local_ids.clamp(min=0)
            given.arguments["topk_weights"] = weights.masked_fill(local_ids < 0, 0.0)
        stock(*given.args, **given.kwargs)

    return apply
