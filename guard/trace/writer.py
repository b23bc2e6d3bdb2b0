"""Writes a trace, a request at a time, so that a crash loses the last one at most."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np

from guard.program.verdict import Routing
from guard.trace.format import (
    BLOCK,
    MARK,
    TOKEN_TYPE,
    RequestFactsOnFile,
    TracedRequest,
    TraceError,
    TraceHeader,
    encode_header,
)

PRIVATE: Final = 0o600
LEVEL: Final = 1
"""Of zlib: ids hardly compress further, and the writer shares the host with the server."""


class TraceWriter:
    """A new file, readable by its owner alone. Not safe for several threads.

    num_requests, num_bytes: written so far
    """

    def __init__(self, path: Path, header: TraceHeader, max_bytes: int | None = None) -> None:
        """Raises OSError; FileExistsError where there is a file already."""
        self.path = path
        self.header = header
        self._max_bytes = max_bytes
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        self._file = os.fdopen(descriptor, "wb")
        os.fchmod(descriptor, PRIVATE)  # whatever the umask
        self.num_requests = 0
        self.num_bytes = self._file.write(encode_header(header))
        self._file.flush()

    def write(self, request: TracedRequest) -> bool:
        """False, and nothing is written, where the file would grow beyond its limit.

        Raises TraceError for routing that does not fit the header, OSError.
        """
        block = encode_request(request, self.header)
        if self._max_bytes is not None and self.num_bytes + len(block) > self._max_bytes:
            return False
        self._file.write(block)
        self._file.flush()
        self.num_bytes += len(block)
        self.num_requests += 1
        return True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def encode_request(request: TracedRequest, header: TraceHeader) -> bytes:
    """One block. Raises TraceError for routing that does not fit the header."""
    routing, topology = request.routing, header.topology
    shape = (len(routing.topk_ids), len(topology.layers), topology.max_top_k)
    if routing.topk_ids.shape != shape or routing.topk_weights.shape != shape:
        raise TraceError(f"routing of shape {routing.topk_ids.shape} where the trace has {shape}")
    chosen = (routing.topk_ids >= 0) & (routing.topk_weights != 0)
    largest = np.iinfo(header.id_type).max
    ids = np.where(chosen, routing.topk_ids, largest)
    if (ids[chosen] >= topology.max_experts).any():
        raise TraceError(f"an expert id beyond the trace's {topology.max_experts} experts")
    arrays = [ids.astype(header.id_type).tobytes()]
    if header.weights is not None:
        weights = np.where(chosen, routing.topk_weights, 0)
        if header.weights == "float16":
            # A weight too small for it is still not zero: the expert was chosen.
            smallest = np.finfo(np.float16).smallest_subnormal
            weights = np.where(chosen, np.maximum(weights, smallest), 0)
        arrays.append(weights.astype(np.dtype(header.weights).newbyteorder("<")).tobytes())
    if header.tokens:
        arrays.append(_token_bytes(request))
    raw = b"".join(arrays)
    facts = msgspec.json.encode(
        RequestFactsOnFile(
            prompt=routing.num_prompt_tokens,
            positions=len(routing.topk_ids),
            id=request.request_id,
            time=round(request.time, 3),
            unseen=_unseen_spans(routing),
            labels=dict(request.labels),
            lora_adapter=request.lora_adapter,
        )
    )
    packed = zlib.compress(raw, LEVEL)
    checksum = zlib.crc32(packed, zlib.crc32(facts))
    return BLOCK.pack(MARK, len(facts), len(raw), len(packed), checksum) + facts + packed


def _token_bytes(request: TracedRequest) -> bytes:
    token_ids, positions = request.token_ids, len(request.routing.topk_ids)
    if token_ids is None or token_ids.shape != (positions,):
        number = "no" if token_ids is None else len(token_ids)
        raise TraceError(f"{number} token ids where the request has {positions} positions")
    if (token_ids < 0).any():
        raise TraceError("a token id below 0")
    return token_ids.astype(TOKEN_TYPE).tobytes()


def _unseen_spans(routing: Routing) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = [(0, routing.first_seen)] if routing.first_seen else []
    for position in sorted(routing.unseen):
        if position < routing.first_seen:
            continue
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], position + 1)
        else:
            spans.append((position, position + 1))
    return spans
