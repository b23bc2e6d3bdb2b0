"""Which experts a row must not use: bits on rows, bits on experts, masked where they meet."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch

from guard.device.layout import Capacity
from guard.device.shared_masks import SharedMasks
from guard.program.program import WORD_BITS, MaskMethodCode, MaskTable
from guard.program.topology import Topology


class MaskedExperts(NamedTuple):
    """What masks ask of one layer's routing: four disjoint bool tensors [T, E].

    rerouted_TE: out before top-k; the next best expert comes in
    drop_renormed_TE: out after top-k, its weight going to the other chosen ones
    dropped_TE: out after top-k
    forced_TE: always among the k
    """

    rerouted_TE: torch.Tensor
    drop_renormed_TE: torch.Tensor
    dropped_TE: torch.Tensor
    forced_TE: torch.Tensor

    @property
    def excluded_TE(self) -> torch.Tensor:
        """The experts that must carry no weight."""
        return self.rerouted_TE | self.drop_renormed_TE | self.dropped_TE

    @property
    def applies_T1(self) -> torch.Tensor:
        """bool [T, 1]: some mask of this layer applies to the row; the others keep their routing."""
        return (self.excluded_TE | self.forced_TE).any(dim=-1, keepdim=True)


class MaskBits(NamedTuple):
    """A program's masks, shaped like the buffers of `ExpertMask`."""

    experts_LEW: torch.Tensor
    methods_MW: torch.Tensor


class ExpertMask:
    """Fixed buffers that the forward reads; any mix of masks in a batch costs the same.

    row_bits_TW: int64, the mask actions in force for each row of this step
    rows_in_use: behind the first so many, no row is masked
    expert_bits_LEW: int64, the mask actions that name each expert
    method_bits_MW: int64, the mask actions of each `MaskMethodCode`
    shared: where layers route the rows of several engines together
    """

    def __init__(self, topology: Topology, capacity: Capacity, device: torch.device) -> None:
        self.row_bits_TW = torch.zeros(
            (capacity.max_rows, capacity.mask_words), dtype=torch.int64, device=device
        )
        self.expert_bits_LEW = torch.zeros(
            (len(topology.layers), topology.max_experts, capacity.mask_words),
            dtype=torch.int64,
            device=device,
        )
        self.method_bits_MW = torch.zeros(
            (len(MaskMethodCode), capacity.mask_words), dtype=torch.int64, device=device
        )
        self.shared: SharedMasks | None = None
        self._num_experts_L = [layer.num_experts for layer in topology.layers]
        self.rows_in_use = 0
        self._address = self.row_bits_TW.data_ptr() if device.type == "cpu" else None

    def share(self) -> SharedMasks:
        """Rows come from other engines, too. At start: all engines are at the same program."""
        if self.shared is None:
            self.shared = SharedMasks(self.expert_bits_LEW, self.method_bits_MW)
            self.shared.announce(self.expert_bits_LEW, self.method_bits_MW, generation=0)
            self.shared.turn_to(0)
        return self.shared

    def install(self, masks: MaskTable, generation: int = 0) -> None:
        """Take over a program's masks; its words must fit the capacity."""
        self.put(self.prepare(masks), generation)

    def prepare(self, masks: MaskTable) -> MaskBits:
        """What `install` writes, laid out on the device ahead of it."""
        assert masks.num_words <= self.expert_bits_LEW.shape[-1], "provisioned for fewer masks"
        experts_LEW = torch.zeros_like(self.expert_bits_LEW)
        methods_MW = torch.zeros_like(self.method_bits_MW)
        experts_LEW[..., : masks.num_words] = torch.from_numpy(masks.expert_bits)
        is_method_MA = masks.method == np.arange(len(MaskMethodCode))[:, None]
        methods_MW[:, : masks.num_words] = pack_bits(torch.from_numpy(is_method_MA))
        return MaskBits(experts_LEW, methods_MW)

    def announce(self, bits: MaskBits, generation: int) -> None:
        """Rows of other engines may be masked by them from now on."""
        if self.shared is not None:
            self.shared.announce(bits.experts_LEW, bits.methods_MW, generation)

    def put(self, bits: MaskBits, generation: int) -> None:
        """Into the buffers that captured graphs read; no row is masked until `set_rows`."""
        self.clear_rows()
        self.expert_bits_LEW.copy_(bits.experts_LEW)
        self.method_bits_MW.copy_(bits.methods_MW)
        if self.shared is not None:
            self.announce(bits, generation)
            self.shared.turn_to(generation)

    def set_rows(self, in_force_TA: torch.Tensor) -> None:
        """The actions in force for the rows of the step that begins; rows behind them get none."""
        words_TW = pack_bits(in_force_TA)
        num_rows, num_words = words_TW.shape
        self.clear_rows()
        self.row_bits_TW[:num_rows, :num_words] = words_TW
        self.rows_in_use = num_rows

    def take_rows(self, num_rows: int) -> int:
        """For whoever writes the rows of a step, and zeros behind them: how many to write at least."""
        before, self.rows_in_use = self.rows_in_use, num_rows
        return before

    def clear_rows(self) -> None:
        """No row is masked: for dummy runs, and before a step."""
        if not self.rows_in_use:
            return
        if self._address is None:
            self.row_bits_TW[: self.rows_in_use].zero_()
        else:  # in each step: not worth two operations of torch
            row_bytes = self.row_bits_TW.shape[1] * self.row_bits_TW.itemsize
            ctypes.memset(self._address, 0, self.rows_in_use * row_bytes)
        self.rows_in_use = 0

    def wanted(self, layer: int, row_bits_TW: torch.Tensor) -> MaskedExperts:
        """What masks in force ask of the rows that a layer routes. Traced into compiled graphs.

        row_bits_TW: int64, of the first of the step's rows
        """
        expert_bits_EW = self.expert_bits_LEW[layer, : self._num_experts_L[layer]]
        return _wanted(row_bits_TW, self.method_bits_MW, expert_bits_EW)

    def wanted_of_all(self, layer: int, row_bits_TX: torch.Tensor) -> MaskedExperts:
        """The same of rows of all engines, with the bits that came with them."""
        assert self.shared is not None, "rows are this engine's own"
        expert_bits_EX = self.shared.expert_bits_LEX[layer, : self._num_experts_L[layer]]
        return _wanted(row_bits_TX, self.shared.method_bits_MX, expert_bits_EX)


def _wanted(
    row_bits_TW: torch.Tensor, method_bits_MW: torch.Tensor, expert_bits_EW: torch.Tensor
) -> MaskedExperts:
    rows_MT1W = (row_bits_TW & method_bits_MW[:, None]).unsqueeze(2)
    hits_MTE = (rows_MT1W & expert_bits_EW).ne(0).any(dim=-1)
    rerouted, drop_renormed, dropped, forced = hits_MTE.unbind()
    drop_renormed = drop_renormed & ~rerouted
    out = rerouted | drop_renormed
    dropped = dropped & ~out
    return MaskedExperts(rerouted, drop_renormed, dropped, forced & ~(out | dropped))


def pack_bits(flags_NA: torch.Tensor) -> torch.Tensor:
    """int64 [N, W] with action a at bit a % 64 of word a // 64; the sign bit is bit 63."""
    shifts_A = torch.arange(flags_NA.shape[1], device=flags_NA.device) % WORD_BITS
    bits_NA = flags_NA.to(torch.int64) << shifts_A
    words = [part.sum(dim=1) for part in bits_NA.split(WORD_BITS, dim=1)]
    return torch.stack(words, dim=1)  # one word of nothing where there are no actions
