"""A pickled pandas table, read without pandas and without running anything that it names.

A pickle says which functions to call. Here each name that a table of numbers and texts needs stands
for a function of this file that merely keeps what it is given; any other name is refused. Written for
tables of pandas 1.3 to 2.x.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from guard.discover.errors import DiscoverError

Cell = int | float | str
MAX_CELLS: Final = 1 << 24
MAX_MEMO: Final = 1 << 20
_MEMO_OPCODES: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_MAX_SHOWN: Final = 200
_NO_CELL: Final = "holds a cell that is neither a number nor a text"
_KINDS: Final = "iufb"


def read_frame(data: bytes) -> dict[str, list[Cell]]:
    """Columns by name. Raises DiscoverError."""
    try:
        _refuse_bombs(data)
        found = _Reader(io.BytesIO(data)).load()
        if not isinstance(found, _Frame) or found.manager is None:
            raise DiscoverError("is a pickle of something else than a pandas table")
        return found.columns()
    except DiscoverError:
        raise
    # What a damaged or hostile pickle makes the unpickler and the stand-ins raise, by its documentation
    # and by trial.
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        MemoryError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        told = ascii(str(error))  # it may quote half of a character
        raise DiscoverError(f"is no pickled table ({type(error).__name__}: {told})") from error


def _refuse_bombs(data: bytes) -> None:
    """The unpickler allocates what a length or a memo's number says, whether it is there or not.

    Here each opcode's argument is read in full first.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and argument > MAX_MEMO:
            raise DiscoverError(f"keeps more than {MAX_MEMO} objects")


class _Kept:
    """Has a state, and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Kept):
    """numpy.dtype(text, ...); its state has the byte order second."""

    def __init__(self, text: Any, *_: object) -> None:
        self._text = text

    def numpy(self) -> np.dtype[Any]:
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if not isinstance(self._text, str) or len(self._text) > 3 or self._text[:1] not in _KINDS:
            raise DiscoverError("holds columns of a kind that is no number")
        return np.dtype(("<" if order not in ("<", ">", "|", "=") else order) + self._text)

    @property
    def is_object(self) -> bool:
        return bool(self._text == "O8" or self._text == "O")


class _Array(_Kept):
    """numpy's array, as its own pickle has it: (version, shape, dtype, is in Fortran's order, data)."""

    def cells(self) -> NDArray[Any]:
        _, shape, dtype, is_fortran, data = self.state
        return _array(data, dtype, shape, "F" if is_fortran else "C")


@dataclass(frozen=True)
class _Buffer:
    """The same under protocol 5."""

    data: Any
    dtype: _Dtype
    shape: Any
    order: str

    def cells(self) -> NDArray[Any]:
        return _array(self.data, self.dtype, self.shape, self.order)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or len(shape) > 2:
        raise DiscoverError("holds an array that is no column")
    num_cells = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise DiscoverError("holds an array of an impossible shape")
        num_cells *= size
    if num_cells > MAX_CELLS:
        raise DiscoverError(f"holds more than {MAX_CELLS} cells")
    if dtype.is_object:
        if not isinstance(data, list) or len(data) != num_cells:
            raise DiscoverError("holds an array that is not as large as it says")
        # A name is written out: one that is a pair of a pair of the same pair, and so on, has no end.
        if not all(isinstance(cell, Cell) for cell in data):
            raise DiscoverError(_NO_CELL)
        flat = np.empty(num_cells, dtype=object)
        flat[:] = data
    else:
        if not isinstance(data, bytes | bytearray) or len(data) != num_cells * dtype.numpy().itemsize:
            raise DiscoverError("holds an array that is not as large as it says")
        flat = np.frombuffer(data, dtype.numpy())
    return flat.reshape(shape, order="F" if order == "F" else "C")


@dataclass(frozen=True)
class _Index:
    """A row of names, or a range."""

    facts: Mapping[str, Any]

    def names(self) -> list[Any]:
        data = self.facts.get("data")
        if not isinstance(data, _Array | _Buffer):
            raise DiscoverError("its columns have no names")
        return data.cells().ravel().tolist()


@dataclass(frozen=True)
class _Block:
    """Some of the columns, a row of `values` each; place: which they are."""

    values: Any
    place: Any
    num_dimensions: Any = 2

    def numbers(self, num_columns: int) -> Sequence[int]:
        if isinstance(self.place, slice):
            return range(num_columns)[self.place]
        if isinstance(self.place, _Array | _Buffer):
            return [int(number) for number in self.place.cells().ravel().tolist()]
        raise DiscoverError("does not say which columns its numbers are of")


@dataclass(frozen=True)
class _Manager:
    blocks: Any
    axes: Any


class _Frame(_Kept):
    @property
    def manager(self) -> _Manager | None:
        found = self.state.get("_mgr") if isinstance(self.state, dict) else None
        return found if isinstance(found, _Manager) else None

    def columns(self) -> dict[str, list[Cell]]:
        manager = self.manager
        assert manager is not None
        names = manager.axes[0].names()
        found: dict[str, list[Cell]] = {}
        for block in manager.blocks:
            cells = block.values.cells()
            for row, number in zip(cells, block.numbers(len(names)), strict=True):
                found[str(names[number])] = [_cell(value) for value in row.tolist()]
        if len({len(column) for column in found.values()}) > 1:
            raise DiscoverError("has columns of different lengths")
        return found


def _cell(value: Any) -> Cell:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise DiscoverError("holds a number of more than 64 bits")
    if isinstance(value, Cell):
        return value
    raise DiscoverError(_NO_CELL)


def _new_index(_: object, facts: Any) -> _Index:
    if not isinstance(facts, dict):
        raise DiscoverError("has an index without facts")
    return _Index(facts)


class _Name(_Kept):
    """A class that is only named."""


def _reconstruct(*_: object) -> _Array:
    return _Array()


_NAMES: Final[Mapping[tuple[str, str], Callable[..., Any]]] = {
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Name,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _Block,
    ("pandas.core.indexes.base", "_new_Index"): _new_index,
    ("pandas.core.indexes.base", "Index"): _Name,
    ("pandas.core.indexes.range", "RangeIndex"): _Name,
    ("pandas.core.indexes.numeric", "Int64Index"): _Name,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _NAMES[module, name]
        except KeyError:
            named = f"{module}.{name}"
            shown = named if named.isascii() and named.isprintable() else ascii(named)
            raise DiscoverError(
                f"names {shown[:_MAX_SHOWN]}, which no table of numbers needs; it is not read, for "
                "reading a pickle may run what it names"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise DiscoverError("refers to something outside of it")
