"""Prefixes that requests took from the KV cache: their rows, in chunks, as if they were computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from guard.device.rows import StepBatch
from guard.device.state import host_to_device


class CachedPrefix(NamedTuple):
    """The first `num_tokens` positions of a request, whose KV lies in `blocks`, in order.

    request: the request's place in the step
    """

    request: int
    slot: int
    blocks: Sequence[int]
    num_tokens: int


class ReplayChunk(NamedTuple):
    """requests_np: [B] places in the step of the requests of `batch`
    kv_slot_T: int64 [T] where each row's KV lies
    """

    requests_np: np.ndarray
    batch: StepBatch
    kv_slot_T: torch.Tensor


def replay_chunks(
    prefixes: Sequence[CachedPrefix], block_size: int, max_rows: int, device: torch.device
) -> Iterator[ReplayChunk]:
    """All positions of all prefixes, of each request in order, at most `max_rows` at a time.

    The host knows every number in it: nothing here waits for the device.
    """
    chunk: list[tuple[CachedPrefix, int, int]] = []
    left = max_rows
    for prefix in prefixes:
        start = 0
        while start < prefix.num_tokens:
            stop = min(prefix.num_tokens, start + left)
            chunk.append((prefix, start, stop))
            left -= stop - start
            start = stop
            if left == 0:
                yield _chunk(chunk, block_size, device)
                chunk, left = [], max_rows
    if chunk:
        yield _chunk(chunk, block_size, device)


def _chunk(
    parts: Sequence[tuple[CachedPrefix, int, int]], block_size: int, device: torch.device
) -> ReplayChunk:
    positions = [np.arange(start, stop, dtype=np.int64) for _, start, stop in parts]
    kv_slots = [
        np.asarray(prefix.blocks, dtype=np.int64)[at // block_size] * block_size + at % block_size
        for (prefix, _, _), at in zip(parts, positions, strict=True)
    ]
    query_start_np = np.cumsum([0, *map(len, positions)], dtype=np.int64)
    batch = StepBatch.of(
        host_to_device(np.array([prefix.slot for prefix, _, _ in parts], dtype=np.int64), device),
        host_to_device(query_start_np, device),
        host_to_device(np.concatenate(positions), device),
    )
    return ReplayChunk(
        np.array([prefix.request for prefix, _, _ in parts], dtype=np.int64),
        batch,
        host_to_device(np.concatenate(kv_slots), device),
    )
