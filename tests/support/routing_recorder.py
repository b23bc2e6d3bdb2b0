"""What the guard's tap held at each step, read in the worker: for tests only.

vLLM mixes `RoutingRecorder` into its worker class (`worker_extension_cls`), and a test reaches its
methods with `LLM.collective_rpc`.
"""

from __future__ import annotations

from typing import Any


class RoutingRecorder:
    """Keeps, for each request, the position and the chosen experts of every row that was judged."""

    def start_recording(self) -> None:
        rows: dict[str, list[Any]] = {}
        self._recorded_rows = rows
        status = getattr(self, "moe_guard_status", None)
        if status is None or hasattr(self, "_recording"):
            return
        self._recording = True
        guard = status.__self__._hooks.guard
        stock = guard.end_step

        def end_step(*args: Any, **kwargs: Any) -> Any:
            batch, req_ids = guard.batch, guard._req_ids
            if batch is not None:
                num_rows = len(batch.position_T)
                columns = [batch.position_T.tolist(), *self.recorded_columns(guard, num_rows)]
                starts = batch.query_start_B1.tolist()
                for req_id, first, stop in zip(req_ids, starts, starts[1:], strict=False):
                    self._recorded_rows.setdefault(req_id, []).extend(
                        [column[row] for column in columns] for row in range(first, stop)
                    )
            return stock(*args, **kwargs)

        guard.end_step = end_step

    def slots(self) -> dict[str, int]:
        """What the guard's slots are at now, between two steps."""
        status: Any = self.moe_guard_status  # type: ignore[attr-defined]
        guard = status.__self__._hooks.guard
        return {
            "all": guard._state.num_slots - 1,
            "free": len(set(guard._free_slots)),
            "followed": guard.num_requests,
            "awaiting": len(guard._cached) + len(guard._missed),
        }

    def recorded_columns(self, guard: Any, num_rows: int) -> list[list[Any]]:
        """What is kept of a step's rows, beside their positions."""
        return [guard.tap.topk_ids_TLK[:num_rows].tolist()]

    def recorded_rows(self) -> dict[str, list[Any]]:
        """By vLLM's own request id: [position, [layers, top_k] ids] of each row, in step order."""
        return self._recorded_rows


class WeightsRecorder(RoutingRecorder):
    """Its rows have a third entry: [layers, top_k] gate weights."""

    def recorded_columns(self, guard: Any, num_rows: int) -> list[list[Any]]:
        return [
            *super().recorded_columns(guard, num_rows),
            guard.tap.topk_weights_TLK[:num_rows].tolist(),
        ]
