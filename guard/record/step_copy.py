"""A step's routing on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.tap import RoutingTap


class StepCopy:
    """Copies of a step's rows; `ready` waits for them, and for nothing else.

    req_ids: B requests in row order
    topk_ids_TLK, topk_weights_TLK: as in the tap
    position_T, query_start_B1: as in `StepBatch`; rejected_B: draft rows that do not count, or None

    On CUDA they are enqueued behind the step into pinned memory of their own, on the stream that the
    next step comes on, because it writes the same buffers.
    """

    def __init__(
        self,
        req_ids: Sequence[str],
        tap: RoutingTap,
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        rejected_B: torch.Tensor | None,
    ) -> None:
        self.req_ids = tuple(req_ids)
        num_rows = len(position_T)
        self._ids = _to_host(tap.topk_ids_TLK[:num_rows])
        self._weights = _to_host(tap.topk_weights_TLK[:num_rows])
        self._positions = _to_host(position_T)
        self._starts = _to_host(query_start_B1)
        self._rejected = None if rejected_B is None else _to_host(rejected_B)
        self.num_bytes = self._ids.nbytes + self._weights.nbytes
        self._done: torch.cuda.Event | None = None
        if position_T.is_cuda:
            self._done = torch.cuda.Event(blocking=True)
            self._done.record()

    def ready(self) -> StepCopy:
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self

    def rows(self) -> list[tuple[str, int, NDArray[np.int32], NDArray[np.float32]]]:
        """Of each request: its id, the position of its first row, and its accepted rows' routing."""
        starts, positions = self._starts.tolist(), self._positions
        rejected = [0] * len(self.req_ids) if self._rejected is None else self._rejected.tolist()
        ids, weights = self._ids.numpy(), self._weights.numpy()
        return [
            (req_id, int(positions[start]), ids[start : stop - cut], weights[start : stop - cut])
            for req_id, start, stop, cut in zip(
                self.req_ids, starts[:-1], starts[1:], rejected, strict=True
            )
            if stop - cut > start
        ]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
