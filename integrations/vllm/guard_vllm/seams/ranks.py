"""Ranks that serve one model together."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

SEAMS: tuple[Seam, ...] = (
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
)
