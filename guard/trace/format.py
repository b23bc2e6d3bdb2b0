"""The layout of a trace file, version 1; `docs/trace-format.md` describes it byte by byte.

A line of JSON, the header, and then a block for each request: sizes and a checksum, its facts as JSON,
its arrays compressed. Nothing in a file is ever executed, and no size is believed before it is checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from guard.errors import GuardError
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing

FORMAT: Final = "moe-guard-trace"
VERSION: Final = 1
SUFFIX: Final = ".moetrace"

MAX_HEADER_BYTES: Final = 1 << 20
MAX_FACTS_BYTES: Final = 1 << 20
MAX_LAYERS: Final = 4096
MAX_EXPERTS: Final = 65_535
MAX_TOP_K: Final = 1024
MAX_POSITIONS: Final = 1 << 24
MAX_ARRAY_BYTES: Final = 2 << 30

BLOCK: Final = struct.Struct("<4sIQQI")
"""Mark, bytes of the facts, bytes of the arrays, bytes of them compressed, CRC-32 of both as stored."""
MARK: Final = b"REQ1"

TOKEN_TYPE: Final = "<i4"

WeightType = Literal["float32", "float16"]


class TraceError(GuardError):
    """A file that is no trace, or is damaged, with the place where that shows."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What holds for all requests of a trace.

    model: the served model's name
    weights: how gate weights are kept; None: they are not
    engine: name and version of what served the model
    created: seconds since 1970, UTC
    tokens: token ids are kept, and with them the text itself
    """

    model: str
    topology: Topology
    weights: WeightType | None = "float32"
    engine: str = ""
    created: float = 0.0
    tokens: bool = False

    @property
    def id_type(self) -> DTypeLike:
        """The smallest unsigned type that has a value left over, which stands for no expert."""
        return np.dtype("<u1") if self.topology.max_experts <= 0xFF else np.dtype("<u2")

    @property
    def bytes_per_position(self) -> int:
        per_choice = np.dtype(self.id_type).itemsize
        per_choice += 0 if self.weights is None else np.dtype(self.weights).itemsize
        per_token = np.dtype(TOKEN_TYPE).itemsize if self.tokens else 0
        return len(self.topology.layers) * self.topology.max_top_k * per_choice + per_token


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    request_id: the engine's own, or a random one
    time: when it ended, in seconds since 1970, UTC
    labels, lora_adapter: what the policies' matches may ask for
    token_ids: [positions], as in the routing; None where the trace keeps none
    """

    routing: Routing
    request_id: str = ""
    time: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    lora_adapter: str | None = None
    token_ids: NDArray[np.int32] | None = None


class RequestFactsOnFile(msgspec.Struct, omit_defaults=True):
    """A block's JSON. unseen: [start, stop) of positions without routing, rising."""

    prompt: int
    positions: int
    id: str = ""
    time: float = 0.0
    unseen: list[tuple[int, int]] = []
    labels: dict[str, str] = {}
    lora_adapter: str | None = None


class _LayerOnFile(msgspec.Struct):
    number: int
    experts: int
    top_k: int


class _HeaderOnFile(msgspec.Struct):
    """Unknown keys are passed over: a later version 1 may say more in its header."""

    format: str
    version: int
    model: str
    architecture: str
    layers: list[_LayerOnFile]
    weights: WeightType | None = None
    engine: str = ""
    created: float = 0.0
    tokens: bool = False


def encode_header(header: TraceHeader) -> bytes:
    """One line of JSON, its end included."""
    layers = [
        {"number": layer.number, "experts": layer.num_experts, "top_k": layer.top_k}
        for layer in header.topology.layers
    ]
    on_file: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": header.model,
        "architecture": header.topology.architecture,
        "layers": layers,
        "weights": header.weights,
        "engine": header.engine,
        "created": header.created,
    } | ({"tokens": True} if header.tokens else {})
    return json.dumps(on_file, separators=(",", ":")).encode() + b"\n"


def decode_header(line: bytes, file: str) -> TraceHeader:
    """Raises TraceError."""
    if not line.endswith(b"\n"):
        raise TraceError(
            f"{file}: is no trace: its first line has no end within {MAX_HEADER_BYTES} bytes"
        )
    try:
        on_file = msgspec.json.decode(line, type=_HeaderOnFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{file}: is no trace: its first line is not its header ({error})") from error
    if on_file.format != FORMAT:
        raise TraceError(f"{file}: is no trace: its format is {on_file.format[:60]!r}, not {FORMAT!r}")
    if on_file.version != VERSION:
        raise TraceError(
            f"{file}: is a trace of version {on_file.version}, and version {VERSION} is read here; "
            "use the MoE Guard that wrote it, or a later one"
        )
    numbers = [layer.number for layer in on_file.layers]
    is_sound = (
        0 < len(numbers) <= MAX_LAYERS
        and numbers == sorted(set(numbers))
        and numbers[0] >= 0
        and all(
            0 < layer.experts <= MAX_EXPERTS and 0 < layer.top_k <= min(layer.experts, MAX_TOP_K)
            for layer in on_file.layers
        )
    )
    if not is_sound:
        raise TraceError(f"{file}: its header has no sound list of MoE layers; record it again")
    layers = tuple(MoELayer(layer.number, layer.experts, layer.top_k) for layer in on_file.layers)
    return TraceHeader(
        on_file.model,
        Topology(on_file.architecture, layers),
        on_file.weights,
        on_file.engine,
        on_file.created,
        on_file.tokens,
    )
