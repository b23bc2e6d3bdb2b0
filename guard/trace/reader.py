"""Reads a trace, a request at a time. A file may come from anywhere: every size in it is checked."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from guard.program.verdict import Routing
from guard.trace.format import (
    BLOCK,
    MARK,
    MAX_ARRAY_BYTES,
    MAX_FACTS_BYTES,
    MAX_HEADER_BYTES,
    MAX_POSITIONS,
    SUFFIX,
    TOKEN_TYPE,
    RequestFactsOnFile,
    TracedRequest,
    TraceError,
    decode_header,
)


class TraceReader:
    """One file. Iterating it reads it from its first request on, holding one request at a time.

    torn: after the iteration: the file ends within a block, as after a crash, and that block is lost
    offset: bytes read so far; size: of the file
    """

    def __init__(self, path: Path) -> None:
        """Raises TraceError."""
        self.path = path
        self.torn = False
        self.offset = 0
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                line = file.readline(MAX_HEADER_BYTES)
        except OSError as error:
            raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
        self._first_block = len(line)
        self.header = decode_header(line, str(path))

    def __iter__(self) -> Iterator[TracedRequest]:
        """Raises TraceError at a block that is whole and wrong."""
        with self.path.open("rb") as file:
            file.seek(self._first_block)
            self.offset, self.torn = self._first_block, False
            while block := self._next_block(file):
                yield self._request(*block)

    def _next_block(self, file: BinaryIO) -> tuple[bytes, bytes, int] | None:
        head = file.read(BLOCK.size)
        if len(head) < BLOCK.size:
            self.torn = bool(head)
            return None
        mark, num_facts, num_raw, num_packed, checksum = BLOCK.unpack(head)
        if mark != MARK:
            raise self._error("there is no block; the file is damaged")
        most_packed = num_raw + num_raw // 1000 + 1024
        if num_facts > MAX_FACTS_BYTES or num_raw > MAX_ARRAY_BYTES or num_packed > most_packed:
            raise self._error("a block's sizes are beyond what a request can have; the file is damaged")
        if self.offset + BLOCK.size + num_facts + num_packed > self.size:
            self.torn = True
            return None
        facts, packed = file.read(num_facts), file.read(num_packed)
        if len(packed) < num_packed:
            self.torn = True
            return None
        if zlib.crc32(packed, zlib.crc32(facts)) != checksum:
            raise self._error("a block does not have its checksum; the file is damaged")
        self.offset += BLOCK.size + num_facts + num_packed
        return facts, packed, num_raw

    def _request(self, facts_json: bytes, packed: bytes, num_raw: int) -> TracedRequest:
        try:
            facts = msgspec.json.decode(facts_json, type=RequestFactsOnFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._error(f"a request's facts cannot be read ({error})") from error
        header = self.header
        if not facts.prompt >= 1 or not 0 <= facts.positions <= MAX_POSITIONS:
            raise self._error("a request has an impossible number of tokens")
        if facts.positions * header.bytes_per_position != num_raw:
            raise self._error("a request's arrays are not as large as its tokens ask for")
        before = 0
        for start, stop in facts.unseen:
            if not before <= start < stop <= facts.positions:
                raise self._error("a request's unseen positions are not its own")
            before = stop
        try:
            inflater = zlib.decompressobj()
            raw = inflater.decompress(packed, num_raw) if num_raw else b""
        except zlib.error as error:
            raise self._error(f"a request's arrays cannot be unpacked ({error})") from error
        if len(raw) != num_raw:
            raise self._error("a request's arrays are shorter than their block says")
        routing = self._routing(raw, facts)
        token_ids = self._token_ids(raw, facts.positions) if header.tokens else None
        return TracedRequest(routing, facts.id, facts.time, facts.labels, facts.lora_adapter, token_ids)

    def _routing(self, raw: bytes, facts: RequestFactsOnFile) -> Routing:
        header, topology = self.header, self.header.topology
        shape = (facts.positions, len(topology.layers), topology.max_top_k)
        num_choices = shape[0] * shape[1] * shape[2]
        on_file = np.frombuffer(raw, header.id_type, num_choices).reshape(shape)
        none = np.iinfo(header.id_type).max
        num_experts = np.array([layer.num_experts for layer in topology.layers])[:, None]
        chosen = on_file != none
        if (chosen & (on_file >= num_experts)).any():
            raise self._error("a request chose an expert that the model does not have")
        topk_ids = np.where(chosen, on_file.astype(np.int32), np.int32(-1))
        if header.weights is None:
            number = np.maximum(1, chosen.sum(axis=2, keepdims=True))
            topk_weights = np.where(chosen, 1 / number, 0).astype(np.float32)
        else:
            kind = np.dtype(header.weights).newbyteorder("<")
            offset = num_choices * np.dtype(header.id_type).itemsize
            topk_weights = np.frombuffer(raw, kind, num_choices, offset).reshape(shape)
            topk_weights = topk_weights.astype(np.float32)
        first_seen, spans = 0, facts.unseen
        if spans and spans[0][0] == 0:
            first_seen, spans = spans[0][1], spans[1:]
        unseen = frozenset(position for span in spans for position in range(*span))
        return Routing(topk_ids, topk_weights, facts.prompt, first_seen, unseen)

    def _token_ids(self, raw: bytes, positions: int) -> NDArray[np.int32]:
        """[positions]: the last of the arrays."""
        start = len(raw) - positions * np.dtype(TOKEN_TYPE).itemsize
        token_ids = np.frombuffer(raw, TOKEN_TYPE, positions, start).astype(np.int32)
        if (token_ids < 0).any():
            raise self._error("a request has a token id below 0")
        return token_ids

    def _error(self, text: str) -> TraceError:
        return TraceError(f"{self.path}: at byte {self.offset}: {text}")


def trace_files(path: Path) -> list[Path]:
    """A trace, or all in a folder, by name. Raises TraceError where there is none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise TraceError(f"{path}: holds no trace: no file in it ends with {SUFFIX}")
    return files
