"""Trace files: damaged ones, and whole ones whose blocks say what they like."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from hypothesis import strategies as st

from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import BLOCK, MARK, TracedRequest, TraceError, TraceHeader, encode_header
from guard.trace.reader import TraceReader
from guard.trace.writer import encode_request
from tools.fuzz.mutation import JSON, Edit, edited, edits, mostly, mutated
from tools.fuzz.part import Outcome, Part, Parts

TORN: Final = Outcome(True, "accepted, torn")

_LAYERS: Final = ((1, 8, 2), (3, 6, 1))
_TOPOLOGY: Final = Topology("TestMoe", tuple(MoELayer(*layer) for layer in _LAYERS))
_HEADER: Final = TraceHeader("some-model", _TOPOLOGY, engine="vllm 0.32.0", created=1.5)
_HEADERS: Final = (
    _HEADER,
    TraceHeader("m", _TOPOLOGY, weights=None),
    TraceHeader("m", _TOPOLOGY, weights="float16", tokens=True),
    TraceHeader("m", Topology("Wide", (MoELayer(0, 300, 4),)), weights=None, tokens=True),
)


def sample(header: TraceHeader, num_requests: int = 2) -> bytes:
    """A whole trace."""
    random = np.random.default_rng(0)
    topology, positions = header.topology, 5
    shape = (positions, len(topology.layers), topology.max_top_k)
    blocks = []
    for number in range(num_requests):
        num_experts = np.array([layer.num_experts for layer in topology.layers])[:, None]
        ids = (random.integers(1 << 16, size=shape) % num_experts).astype(np.int32)
        weights = random.random(shape, dtype=np.float32)
        routing = Routing(ids, weights, 3, first_seen=1, unseen=frozenset({3}))
        tokens = random.integers(1000, size=positions).astype(np.int32) if header.tokens else None
        request = TracedRequest(routing, f"cmpl-{number}", 1.25, {"tenant": "a"}, "adapter", tokens)
        blocks.append(encode_request(request, header))
    return encode_header(header) + b"".join(blocks)


class Block(NamedTuple):
    """num_raw, num_facts: what it says in the place of the truth; None: the truth"""

    facts: bytes
    raw: bytes
    num_raw: int | None = None
    num_facts: int | None = None
    is_right_checksum: bool = True

    def content(self) -> bytes:
        packed = zlib.compress(self.raw)
        checksum = zlib.crc32(packed, zlib.crc32(self.facts)) ^ (not self.is_right_checksum)
        num_raw = len(self.raw) if self.num_raw is None else self.num_raw
        num_facts = len(self.facts) if self.num_facts is None else self.num_facts
        return BLOCK.pack(MARK, num_facts, num_raw, len(packed), checksum) + self.facts + packed


class Made(NamedTuple):
    """edits: of the header's line; ahead: what stands ahead of its first key"""

    header: dict[str, Any]
    edits: Sequence[Edit]
    ahead: bytes
    blocks: Sequence[Block]

    def content(self) -> bytes:
        line = edited(_json(self.header, self.ahead), self.edits) + b"\n"
        return line + b"".join(block.content() for block in self.blocks)


def _json(document: dict[str, Any], ahead: bytes = b"") -> bytes:
    return b"{" + ahead + json.dumps(document).encode()[1:]


DEEP: Final = b'"x":' + b"[" * 1500 + b"]" * 1500 + b","
_AHEAD: Final = mostly(
    st.just(b""), st.sampled_from([DEEP, b'"format":"x",', b'"x":1e999,', b'"\xff":1,'])
)


def _replaced(document: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The document, some of its values and some keys being others."""
    keys = st.one_of(st.sampled_from(sorted(document)), st.text(max_size=4))
    return st.dictionaries(keys, JSON, max_size=2).map(lambda other: {**document, **other})


_SIZES: Final = st.sampled_from([0, 1, 2, 3, 40, 255, 256, 65_535, 65_536, 1 << 20, 1 << 24, 2**63, -1])
_LAYERS_ON_FILE: Final = st.lists(
    st.fixed_dictionaries(
        {
            "number": mostly(st.integers(0, 4), _SIZES),
            "experts": mostly(st.integers(3, 300), _SIZES),
            "top_k": mostly(st.integers(1, 3), _SIZES),
        }
    ),
    max_size=3,
    unique_by=lambda layer: layer["number"],
).map(lambda layers: sorted(layers, key=lambda layer: layer["number"]))
_FACTS: Final = st.fixed_dictionaries(
    {"prompt": mostly(st.integers(1, 4), _SIZES), "positions": mostly(st.integers(0, 4), _SIZES)},
    optional={
        "unseen": mostly(
            st.sampled_from([[], [(0, 1)], [(1, 2)], [(0, 1), (2, 3)]]),
            st.lists(st.tuples(st.integers(-1, 6), _SIZES), max_size=3),
        ),
        "labels": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
        "time": mostly(st.floats(0, 2e9), JSON),
        "id": st.text(max_size=4),
    },
)


@st.composite
def made(draw: st.DrawFn) -> Made:
    header = json.loads(encode_header(draw(st.sampled_from(_HEADERS))))
    changes: list[Edit] = []
    match draw(st.integers(0, 7)):
        case 5:
            header["layers"] = draw(_LAYERS_ON_FILE)
        case 6:
            header = draw(_replaced(header))
        case 7:
            changes = [draw(edits(_HEADER_WORDS))]
    blocks = draw(st.lists(_blocks(_bytes_per_position(header)), max_size=2))
    return Made(header, changes, draw(_AHEAD), blocks)


_HEADER_WORDS: Final = (b'"version":2', b'"weights":"float16"', b'"tokens":true', b'"layers":[]')


@st.composite
def _blocks(draw: st.DrawFn, per_position: int) -> Block:
    facts = draw(mostly(_FACTS, _FACTS.flatmap(_replaced)))
    positions = facts.get("positions")
    num_positions = positions if isinstance(positions, int) else -1
    is_small = 0 <= num_positions * per_position <= 1 << 22
    right = num_positions * per_position if is_small else 0
    if is_small and num_positions > 4 and draw(st.booleans()):
        facts["unseen"] = [(num_positions // 2, num_positions)]
    text = _json(facts, draw(_AHEAD))
    start = draw(st.one_of(st.just(b""), st.binary(max_size=8), st.binary(max_size=64)))[:right]
    raw = start + draw(st.sampled_from([b"\0", b"\1", b"\xff"])) * (right - len(start))
    if draw(st.integers(0, 3)) < 3:
        return Block(text, raw)
    return Block(
        draw(st.one_of(st.just(text), edits().map(lambda edit: edited(text, [edit])))),
        draw(st.one_of(st.just(raw), st.binary(max_size=64))),
        draw(st.one_of(st.none(), _SIZES.map(abs), st.just(right))),
        draw(mostly(st.none(), st.one_of(st.integers(0, 200), st.just(2**32 - 1)))),
        draw(mostly(st.just(True), st.just(False))),
    )


def _bytes_per_position(header: dict[str, Any]) -> int:
    """Of a header that is sound; else whatever."""
    try:
        layers = [MoELayer(one["number"], one["experts"], one["top_k"]) for one in header["layers"]]
        topology = Topology("", tuple(layers))
        of_file = TraceHeader("", topology, header.get("weights"), tokens=header.get("tokens") is True)
        return of_file.bytes_per_position
    except (KeyError, TypeError, ValueError):
        return 1


def parts(folder: Path) -> Parts:
    path = folder / "a.moetrace"

    def read(content: bytes) -> Outcome | None:
        path.write_bytes(content)
        try:
            reader = TraceReader(path)
            for request in reader:
                check(request, reader.header)
                assert reader.offset <= reader.size
        finally:
            assert path.read_bytes() == content, "it was written to"
        return TORN if reader.torn else None

    def read_made(one: Made) -> Outcome | None:
        return read(one.content())

    def files() -> object:
        return sorted(one.name for one in folder.iterdir() if one != path)

    samples = [sample(header) for header in _HEADERS]
    return {
        "damaged": Part(mutated(samples, [MARK]), read, (TraceError,), files),
        "made": Part(made(), read_made, (TraceError,), files),
    }


def check(request: TracedRequest, header: TraceHeader) -> None:
    """Raises AssertionError for what no engine could have seen. Gate weights may be any numbers, for a
    broken model's are: what evaluates them takes those that are not finite for 0."""
    routing, topology = request.routing, header.topology
    positions = len(routing.topk_ids)
    shape = (positions, len(topology.layers), topology.max_top_k)
    assert routing.topk_ids.shape == routing.topk_weights.shape == shape
    assert routing.topk_ids.dtype == np.int32
    assert routing.topk_weights.dtype == np.float32
    num_experts = np.array([layer.num_experts for layer in topology.layers])[:, None]
    assert (routing.topk_ids >= -1).all()
    assert (routing.topk_ids < num_experts).all()
    assert routing.num_prompt_tokens >= 1
    assert 0 <= routing.first_seen <= positions
    assert all(routing.first_seen <= one < positions for one in routing.unseen)
    assert (request.token_ids is not None) is header.tokens
    assert request.token_ids is None or request.token_ids.shape == (positions,)
