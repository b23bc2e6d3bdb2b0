"""Recording of routing in a worker, and what the engine core tells it of requests that end."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path
from typing import Any

from guard.errors import GuardError, UnsupportedHostError
from guard.record.recorder import TraceRecorder
from guard.runtime import Guard
from guard.trace.format import SUFFIX, TraceHeader, WeightType
from guard.trace.writer import TraceWriter
from guard_vllm.compat import seam
from guard_vllm.settings import Settings
from guard_vllm.steps import ENDS_ATTRIBUTE, wrap

FLUSH_METHOD = "moe_guard_flush_trace"

_WEIGHTS: dict[str, WeightType | None] = {"float32": "float32", "float16": "float16", "none": None}


class RecordingError(GuardError):
    """Traces cannot be written where the operator wants them."""


def check_recording(config: Any, settings: Settings) -> None:
    """Raises UnsupportedHostError where a trace would not be whole, RecordingError for a folder."""
    if settings.record is None:
        return
    if config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedHostError(
            "a trace cannot be recorded in a pipeline of ranks (pipeline_parallel_size above 1): each "
            "sees some of the layers only; take `record` out, or serve without a pipeline"
        )
    folder = Path(settings.record)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RecordingError(f"record: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecordingError(f"record: {folder} cannot be written; choose another folder")


def open_recorder(worker: Any, guard: Guard, settings: Settings) -> TraceRecorder | None:
    """One for each engine: of ranks that see the same rows, the first one records."""
    if settings.record is None:
        return None
    if seam("vllm.distributed.parallel_state", "get_tp_group")().rank_in_group != 0:
        return None
    now = time.time()
    config = worker.vllm_config
    served = config.model_config.served_model_name
    header = TraceHeader(
        model=served[0] if isinstance(served, list) else str(served),
        topology=guard.program.topology,
        weights=_WEIGHTS[settings.record_weights],
        engine="vllm " + seam("vllm.version", "__version__"),
        created=round(now, 3),
    )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    engine = config.parallel_config.data_parallel_rank
    path = Path(settings.record) / f"{stamp}-engine{engine}-{os.getpid()}{SUFFIX}"
    try:
        writer = TraceWriter(path, header, max_bytes=int(settings.record_max_gib * 2**30))
    except OSError as error:
        raise RecordingError(f"record: {path} cannot be written: {error.strerror}") from error
    recorder = TraceRecorder(writer, guard.tap, guard.failures, settings.record_sample)
    setattr(worker, FLUSH_METHOD, recorder.flush)
    weakref.finalize(guard, recorder.close)  # with the engine, or with the process
    return recorder


class RequestEnds:
    """In the engine core: tells the workers, with the step that says that a request ended, how many of
    its positions count. An engine that works ahead has computed more."""

    def __init__(self, scheduler: Any) -> None:
        self._ends: dict[str, int] = {}
        wrap(scheduler, "schedule", self._schedule)

    def note(self, request: Any, *, blocked: bool) -> None:
        """The last token was not fed back; but a block withholds it, and then all there are were."""
        self._ends[request.request_id] = request.num_tokens - (not blocked)

    def _schedule(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if self._ends and output.finished_req_ids:
            ended = {
                req_id: self._ends.pop(req_id)
                for req_id in output.finished_req_ids
                if req_id in self._ends
            }
            setattr(output, ENDS_ATTRIBUTE, ended)
        return output
