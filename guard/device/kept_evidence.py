"""What was seen of the tokens whose KV is in the cache, kept by KV slot.

A request that takes a prefix from the cache computes nothing for it, so nothing passes the tap; its
signals are read here instead. What a slot holds is tagged by the life of its block: from the moment
the engine hands a block out until it is written again, nothing in it counts as seen. So the evidence
of a block is that of the tokens whose KV the block holds now, or none: it cannot be a former owner's,
nor does KV that came from elsewhere ever have any. It is tagged by the program that wrote it, too:
signals that came with a later one have not seen the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from guard.device.rows import StepBatch, last_rows
from guard.device.state import host_to_device
from guard.program.program import TOKEN_SIGNAL, SignalTable
from guard.program.topology import Topology

_COLUMNS_AT_ONCE = 4
"""So many more columns are provisioned than a program needs, at most: room for what reloads bring."""

_BlockIds = Sequence[int]


class KeptEvidence:
    """Evidence by KV slot, block · block_size + offset. The last row is a dustbin: padding goes there.

    written_K: int32, 1 + the generation of the program that wrote the slot; 0: nothing counts as seen
    narrow_KX: unit and spread signals
    wide_KX: int64, mass signals, and the tokens' experts where the program asks for them
    Their columns are as in `KeptColumns`.
    """

    def __init__(
        self,
        signals: SignalTable,
        topology: Topology,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        generation: int = 0,
    ) -> None:
        self.block_size = block_size
        self._topology = topology
        self._device = device
        self._dustbin = num_blocks * block_size
        # In order: blocks that lose what they hold, and for copies what they get it from.
        self.staged_writes: list[tuple[_BlockIds, _BlockIds | None]] = []
        self.written_K = torch.zeros(self._dustbin + 1, dtype=torch.int32, device=device)
        widths = _widths(signals, topology)
        self.narrow_KX, self.wide_KX = self._room(widths)
        self._columns = self._laid_out(signals, generation, {}, widths, room=None)

    @staticmethod
    def token_bytes(signals: SignalTable, topology: Topology) -> int:
        """What it keeps for one token."""
        widths = _widths(signals, topology)
        return torch.int32.itemsize + widths.num_narrow * widths.narrow.itemsize + widths.num_wide * 8

    @property
    def columns(self) -> KeptColumns:
        """Where the signals of the program in force are."""
        return self._columns

    @property
    def num_bytes(self) -> int:
        return self.written_K.nbytes + self.narrow_KX.nbytes + self.wide_KX.nbytes

    def prepare(self, signals: SignalTable, generation: int) -> KeptColumns:
        """The columns of a program that is to follow. A signal that goes on keeps its own, others get
        free ones; takes more memory where there are too few, or too narrow ones."""
        needed = _widths(signals, self._topology)
        widths = _Widths(
            max(needed.narrow, self.narrow_KX.dtype, key=lambda dtype: dtype.itemsize),
            max(needed.num_narrow, self.narrow_KX.shape[1]),
            max(needed.num_wide, self.wide_KX.shape[1]),
        )
        fits = widths == (self.narrow_KX.dtype, self.narrow_KX.shape[1], self.wide_KX.shape[1])
        room = None if fits else self._room(widths)
        return self._laid_out(signals, generation, self._columns.place_of, widths, room)

    def install(self, columns: KeptColumns) -> None:
        """From now on the columns are those of the program that `columns` was prepared for."""
        if columns.room is not None:
            for larger_KX, kept_KX in zip(columns.room, (self.narrow_KX, self.wide_KX), strict=True):
                larger_KX[:, : kept_KX.shape[1]] = kept_KX
            self.narrow_KX, self.wide_KX = columns.room
        self._columns = columns

    def _laid_out(
        self,
        signals: SignalTable,
        generation: int,
        place_of: dict[str, int],
        widths: _Widths,
        room: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> KeptColumns:
        def put(array: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.as_tensor(array, dtype=dtype, device=self._device)

        keys = signals.evidence_keys
        first_unit = signals.num_token_signals
        first_mass = first_unit + signals.num_narrow
        narrow = _places(keys[first_unit:first_mass], place_of, widths.num_narrow)
        wide = _places(keys[first_mass:], place_of, widths.num_wide)
        sources = []
        for first, places, width in (
            (first_unit, narrow, widths.num_narrow),
            (first_mass, wide, widths.num_wide),
        ):
            source = np.full(width, TOKEN_SIGNAL)  # whatever: nobody reads a free column
            source[places] = first + np.arange(len(places))
            sources.append(put(source))
        return KeptColumns(
            place_of=dict(zip(keys[first_unit:], [*narrow, *wide], strict=True)),
            tag=1 + generation,
            narrow_source=sources[0],
            wide_source=sources[1],
            narrow_place=put(narrow),
            wide_place=put(wide),
            epochs=put(signals.token_epochs, torch.int32),
            token_signal=put(signals.evidence_token_signal),
            room=room,
        )

    def _room(self, widths: _Widths) -> tuple[torch.Tensor, torch.Tensor]:
        rows, device = self._dustbin + 1, self._device
        return (
            torch.zeros((rows, widths.num_narrow), dtype=widths.narrow, device=device),
            torch.zeros((rows, widths.num_wide), dtype=torch.int64, device=device),
        )

    def forget(self, blocks: _BlockIds) -> None:
        """These blocks were handed out: what they hold is nobody's, from the next flush on."""
        if len(blocks):
            self.staged_writes.append((blocks, None))

    def copy(self, sources: _BlockIds, targets: _BlockIds) -> None:
        """The engine copies these blocks' KV before the step's forward."""
        if len(sources):
            self.staged_writes.append((targets, sources))

    def forget_all(self) -> None:
        """Nothing that was written so far counts as seen."""
        self.staged_writes.clear()
        self.written_K.zero_()

    def apply_staged_writes(self) -> None:
        """Before the step's rows are written. What fails half-way is done again by the next call."""
        if not self.staged_writes:
            return
        written_NO = self.written_K[: self._dustbin].view(-1, self.block_size)
        for targets, sources in self.staged_writes:
            at_N = host_to_device(np.asarray(targets, dtype=np.int64), self._device)
            if sources is None:
                written_NO.index_fill_(0, at_N, 0)
                continue
            from_N = host_to_device(np.asarray(sources, dtype=np.int64), self._device)
            for kept_KX in (self.narrow_KX, self.wide_KX):
                blocks_NOX = kept_KX[: self._dustbin].view(-1, self.block_size, kept_KX.shape[1])
                blocks_NOX[at_N] = blocks_NOX[from_N]
            written_NO[at_N] = written_NO[from_N]
        self.staged_writes.clear()

    def write(self, kv_slot_T: torch.Tensor, signal_TX: torch.Tensor) -> None:
        """Keep a step's signals, real rows all of them, whether or not somebody judges them.

        kv_slot_T: [T] where the engine writes each row's KV; negative where it writes none
        """
        columns = self._columns
        kv_slot_T = kv_slot_T.to(torch.int64)
        at_T = kv_slot_T.where(kv_slot_T >= 0, self._dustbin)
        narrow_TX = signal_TX[:, columns.narrow_source].to(self.narrow_KX.dtype)
        self.narrow_KX.index_copy_(0, at_T, narrow_TX)
        self.wide_KX.index_copy_(0, at_T, signal_TX[:, columns.wide_source])
        # Last, because it says that the token was seen.
        written_T = signal_TX[:, TOKEN_SIGNAL] * columns.tag
        self.written_K.index_copy_(0, at_T, written_T.to(torch.int32))

    def read(self, kv_slot_T: torch.Tensor) -> torch.Tensor:
        """int64 [T, X]; 0 where the signal did not see the slot's token."""
        columns = self._columns
        seen_TN = self.written_K[kv_slot_T][:, None] > columns.epochs
        signal_TX = torch.cat(
            [
                seen_TN.to(torch.int64),
                self.narrow_KX[kv_slot_T][:, columns.narrow_place].to(torch.int64),
                self.wide_KX[kv_slot_T][:, columns.wide_place],
            ],
            dim=1,
        )
        return signal_TX * seen_TN[:, columns.token_signal]


class KeepRows(NamedTuple):
    """Where the evidence of a step's rows is kept.

    kv_slot_T: [T] as in `KeptEvidence.write`
    rejected_B: [B] draft rows at the end of each request, of which nothing is kept; None: none
    """

    kept: KeptEvidence
    kv_slot_T: torch.Tensor
    batch: StepBatch
    rejected_B: torch.Tensor | None

    def write(self, signal_TX: torch.Tensor) -> None:
        kv_slot_T = self.kv_slot_T
        if self.rejected_B is not None:
            last_row_T = last_rows(self.batch, self.rejected_B)[self.batch.request_T]
            row_T = torch.arange(len(signal_TX), device=signal_TX.device)
            kv_slot_T = kv_slot_T.where(row_T <= last_row_T, -1)
        self.kept.write(kv_slot_T, signal_TX)


@dataclass(frozen=True, slots=True)
class KeptColumns:
    """Where a program's signals are in `KeptEvidence`.

    place_of: by its key, the column of each column of the evidence but tokens
    tag: what `written_K` gets
    narrow_source, wide_source: for each column the signal that is written there
    narrow_place, wide_place: for each signal the column that it is read from
    epochs: of each token signal; token_signal: [X] of each signal
    room: larger tensors to move to, if it takes any
    """

    place_of: dict[str, int]
    tag: int
    narrow_source: torch.Tensor
    wide_source: torch.Tensor
    narrow_place: torch.Tensor
    wide_place: torch.Tensor
    epochs: torch.Tensor
    token_signal: torch.Tensor
    room: tuple[torch.Tensor, torch.Tensor] | None


class _Widths(NamedTuple):
    narrow: torch.dtype
    num_narrow: int
    num_wide: int


def _places(keys: Sequence[str], place_of: dict[str, int], width: int) -> list[int]:
    """The column that each signal has already, or the first ones that nobody has."""
    kept = {place_of[key] for key in keys if key in place_of}
    free = iter([place for place in range(width) if place not in kept])
    return [place_of[key] if key in place_of else next(free) for key in keys]


def _rounded(columns: int) -> int:
    return -(-columns // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE


def _widths(signals: SignalTable, topology: Topology) -> _Widths:
    """The least type that holds every unit signal of a token, and how many columns there shall be.

    A token's unit signal is at most the sum over layers of its k largest weights; a spread signal, the
    number of layers.
    """
    num_layers, num_experts = len(topology.layers), topology.max_experts
    largest_L = np.zeros(num_layers)  # of one expert, whatever the signal
    np.maximum.at(largest_L, signals.unit.place // max(1, num_experts), np.abs(signals.unit.value))
    top_k_L = np.array([layer.top_k for layer in topology.layers])
    bound = 1.0 + max(float(largest_L @ top_k_L), num_layers)
    narrow = next(
        dtype for dtype in (torch.int16, torch.int32, torch.int64) if bound <= torch.iinfo(dtype).max
    )
    return _Widths(narrow, _rounded(signals.num_narrow), _rounded(signals.num_wide))
