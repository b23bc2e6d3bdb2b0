"""Others' lists of experts, of every format; pickles as damaged bytes, and put together by opcode.

Nothing that a pickle names is run: that would be an effect, which `limits` sees.
"""

from __future__ import annotations

import itertools
import json
import pickle
import pickletools
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from guard.discover.errors import DiscoverError
from guard.discover.importers import MAX_EXPERT, MAX_LAYER, as_profile_sets, import_sets
from tools.fuzz.mutation import JSON, mostly, mutated
from tools.fuzz.part import Part, Parts

_FRAME: Final = Path(__file__).parents[2] / "tests/unit/discover/data/steermoe_like.pkl"

_EASYSTEER: Final = {
    "layer_configs": {
        "3": {"mode": "deactivate", "expert_ids": [1, 7]},
        "5": {"activate": [2], "deactivate": [9]},
    }
}
_ESFT: Final = {"experts": {"2": [0, 3], "1": [5]}, "shared_experts": False}
_MASK: Final = [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
_WORDS: Final = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"4096",
    b"65535",
    b"65536",
    b"-0",
    b"1.0",
    b"\xef\xbb\xbf",
)

_NUMBER: Final = mostly(st.one_of(st.integers(0, 9), st.integers(0, 9).map(str)), JSON)
_IDS: Final = mostly(st.lists(_NUMBER, max_size=4), JSON)
_KEY: Final = mostly(st.integers(0, 9).map(str), st.text(max_size=4))


def _by_layer(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.dictionaries(_KEY, values, max_size=3), JSON)


_MODES: Final = st.fixed_dictionaries(
    {},
    optional={
        "mode": mostly(
            st.sampled_from(["activate", "deactivate"]), st.one_of(st.text(max_size=50), JSON)
        ),
        "expert_ids": _IDS,
        "activate": _IDS,
        "deactivate": _IDS,
    },
)
_DOCUMENTS: Final[dict[str, tuple[Any, st.SearchStrategy[Any]]]] = {
    "easysteer": (
        _EASYSTEER,
        st.fixed_dictionaries({"layer_configs": _by_layer(mostly(_MODES, JSON))}),
    ),
    "esft": (_ESFT, st.fixed_dictionaries({"experts": _by_layer(_IDS)})),
    "mask": (
        _MASK,
        st.lists(
            mostly(st.lists(st.integers(0, 1), max_size=5), st.one_of(st.lists(_NUMBER), JSON)),
            max_size=4,
        ),
    ),
}


def parts(folder: Path) -> Parts:
    made = {
        f"{kind}, {how}": Part(examples, _reader(folder, kind), (DiscoverError,), _names(folder))
        for kind, (document, documents) in _DOCUMENTS.items()
        for how, examples in (
            ("damaged", mutated([json.dumps(document).encode()], _WORDS)),
            ("made", documents.map(lambda one: json.dumps(one).encode())),
        )
    }
    frame = _FRAME.read_bytes()
    pickles = {"damaged": mutated([frame], _opcodes()), "made": tables(frame)}
    return made | {
        f"steermoe, {how}": Part(
            examples, _reader(folder, "steermoe"), (DiscoverError,), _names(folder)
        )
        for how, examples in pickles.items()
    }


def _reader(folder: Path, kind: str) -> Callable[[bytes], None]:
    path = folder / "list"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = import_sets(path, kind)
        for entries in as_profile_sets(found.sets).values():
            for entry in entries:
                assert type(entry["layer"]) is int
                assert 0 <= entry["layer"] <= MAX_LAYER
                assert entry["experts"]
                assert all(type(one) is int and 0 <= one <= MAX_EXPERT for one in entry["experts"])
        json.dumps(as_profile_sets(found.sets)).encode()
        found.note.encode()

    return read


def _names(folder: Path) -> Callable[[], object]:
    return lambda: sorted(one.name for one in folder.iterdir() if one.name != "list")


def _text(content: bytes) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(content)]) + content


_HOSTILE: Final[tuple[Callable[[], bytes], ...]] = (
    lambda: pickle.LONG4 + struct.pack("<i", 300) + b"\xff" * 299 + b"\x7f",  # a number of 700 digits
    lambda: pickle.LONG4 + struct.pack("<i", 4000) + b"\xff" * 3999 + b"\x7f",  # `str` takes none such
    lambda: pickle.BINUNICODE + struct.pack("<I", 3) + b"\xed\xa0\x80",  # half of a character
    lambda: _nested(40, 2),
    lambda: _nested(3000, 1),
    lambda: pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.BINGET + b"\0" + pickle.APPEND,
    lambda: pickle.BINFLOAT + struct.pack(">d", float("nan")),
    lambda: pickle.BINFLOAT + struct.pack(">d", float("inf")),
    lambda: pickle.BINFLOAT + struct.pack(">d", 2.0),
    lambda: pickle.NONE,
    lambda: pickle.NEWTRUE,
    lambda: pickle.EMPTY_TUPLE,
    lambda: pickle.EMPTY_DICT,
    lambda: pickle.BININT1 + b"\7",
    lambda: pickle.GLOBAL + b"os\nsystem\n",
    lambda: pickle.GLOBAL + b"numpy\ndtype\n",
    lambda: pickle.GLOBAL + b"builtins\nslice\n" + pickle.NONE + pickle.NONE + pickle.NONE
    + pickle.TUPLE3 + pickle.REDUCE,
    lambda: pickle.GLOBAL + "n\udc80\nx\n".encode("utf-8", "surrogateescape"),
    lambda: pickle.UNICODE + b"\\ud800\n",
    lambda: pickle.BINUNICODE8 + struct.pack("<Q", 1 << 60),
    lambda: pickle.PERSID + b"x\n",
    lambda: pickle.EXT1 + b"\1",
    lambda: pickle.STOP,
    *(partial(_text, name) for name in (b"layer", b"expert", b"risk_diff", b"3", b"\xc3\xa4")),
)  # fmt: skip


def _nested(depth: int, width: int) -> bytes:
    """A tuple of the same tuple once or twice, and so on: short here, and not when written out."""
    again = pickle.TUPLE1 if width == 1 else pickle.DUP + pickle.TUPLE2
    return pickle.EMPTY_TUPLE + depth * again


def _opcodes() -> list[bytes]:
    return [one() for one in _HOSTILE]


def tables(frame: bytes) -> st.SearchStrategy[bytes]:
    """The table with the arguments of some opcodes replaced by others, so that it is still a pickle."""
    pieces = _pieces(frame)
    values = [number for number, piece in enumerate(pieces) if piece[:1] in _PUSHES]
    return st.lists(
        st.tuples(st.sampled_from(values), st.integers(0, len(_HOSTILE) - 1)), max_size=3
    ).map(lambda changes: _with(pieces, changes))


_PUSHES: Final = frozenset(
    {
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.SHORT_BINUNICODE, pickle.BINUNICODE),
        *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BINGET, pickle.LONG_BINGET, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.EMPTY_LIST),
        *(pickle.BYTEARRAY8, pickle.BINFLOAT),
    }
)


def _pieces(content: bytes) -> list[bytes]:
    """One for each opcode, with its argument; without the frames, whose lengths would be wrong."""
    places = [place for _, _, place in pickletools.genops(content) if place is not None]
    cuts = [*places, len(content)]
    pieces = [content[begin:end] for begin, end in itertools.pairwise(cuts)]
    return [piece for piece in pieces if piece[:1] != pickle.FRAME]


def _with(pieces: list[bytes], changes: list[tuple[int, int]]) -> bytes:
    changed = list(pieces)
    for place, number in changes:
        changed[place] = _HOSTILE[number]()
    return b"".join(changed)
