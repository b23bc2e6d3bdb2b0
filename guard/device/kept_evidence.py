"""What was seen of the tokens whose KV is in the cache, kept by KV slot.

A request that takes a prefix from the cache computes nothing for it, so nothing passes the tap; its
signals are read here instead. What a slot holds is tagged by the life of its block: from the moment
the engine hands a block out until it is written again, nothing in it counts as seen. So the evidence
of a block is that of the tokens whose KV the block holds now, or none: it cannot be a former owner's,
nor does KV that came from elsewhere ever have any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from guard.device.state import host_to_device
from guard.program.program import TOKEN_SIGNAL, SignalTable
from guard.program.topology import Topology

_BlockIds = Sequence[int]


class KeptEvidence:
    """Evidence by KV slot, block · block_size + offset. The last row is a dustbin: padding goes there.

    narrow_KX: tokens, unit and spread signals; TOKEN_SIGNAL is 1 where the slot's token was seen
    wide_KX: int64, mass signals
    """

    def __init__(
        self,
        signals: SignalTable,
        topology: Topology,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self._device = device
        self._dustbin = num_blocks * block_size
        self._num_narrow = signals.num_narrow
        narrow, wide = _widths(signals, topology)
        rows = self._dustbin + 1
        self.narrow_KX = torch.zeros((rows, self._num_narrow), dtype=narrow, device=device)
        self.wide_KX = torch.zeros((rows, wide), dtype=torch.int64, device=device)
        self._seen_NO = self.narrow_KX[: self._dustbin, TOKEN_SIGNAL].view(num_blocks, block_size)
        self._staged: list[tuple[_BlockIds, _BlockIds | None]] = []  # in order; sources of copies

    @staticmethod
    def token_bytes(signals: SignalTable, topology: Topology) -> int:
        """What it keeps for one token."""
        narrow, wide = _widths(signals, topology)
        return signals.num_narrow * narrow.itemsize + wide * 8

    @property
    def num_bytes(self) -> int:
        return self.narrow_KX.nbytes + self.wide_KX.nbytes

    def forget(self, blocks: _BlockIds) -> None:
        """These blocks were handed out: what they hold is nobody's, from the next flush on."""
        if len(blocks):
            self._staged.append((blocks, None))

    def copy(self, sources: _BlockIds, targets: _BlockIds) -> None:
        """The engine copies these blocks' KV before the step's forward."""
        if len(sources):
            self._staged.append((targets, sources))

    def forget_all(self) -> None:
        """Nothing that was written so far counts as seen."""
        self._staged.clear()
        self._seen_NO.zero_()

    def apply_staged_writes(self) -> None:
        """Before the step's rows are written. What fails half-way is done again by the next call."""
        for targets, sources in self._staged:
            at_N = host_to_device(np.asarray(targets, dtype=np.int64), self._device)
            if sources is None:
                self._seen_NO.index_fill_(0, at_N, 0)
                continue
            from_N = host_to_device(np.asarray(sources, dtype=np.int64), self._device)
            for kept_KX in (self.narrow_KX, self.wide_KX):
                blocks_NOX = kept_KX[: self._dustbin].view(-1, self.block_size, kept_KX.shape[1])
                blocks_NOX[at_N] = blocks_NOX[from_N]
        self._staged.clear()

    def write(self, kv_slot_T: torch.Tensor, signal_TX: torch.Tensor) -> None:
        """Keep a step's signals, real rows all of them, whether or not somebody judges them.

        kv_slot_T: [T] where the engine writes each row's KV; negative where it writes none
        """
        kv_slot_T = kv_slot_T.to(torch.int64)
        at_T = kv_slot_T.where(kv_slot_T >= 0, self._dustbin)
        self.wide_KX.index_copy_(0, at_T, signal_TX[:, self._num_narrow :])
        # Last, because it says that the token was seen.
        self.narrow_KX.index_copy_(0, at_T, signal_TX[:, : self._num_narrow].to(self.narrow_KX.dtype))

    def read(self, kv_slot_T: torch.Tensor) -> torch.Tensor:
        """int64 [T, X]; all 0 where the slot's token was not seen."""
        narrow_TX = self.narrow_KX[kv_slot_T].to(torch.int64)
        signal_TX = torch.cat([narrow_TX, self.wide_KX[kv_slot_T]], dim=1)
        return signal_TX * narrow_TX[:, TOKEN_SIGNAL, None]


def _widths(signals: SignalTable, topology: Topology) -> tuple[torch.dtype, int]:
    """The least type that holds every unit signal of a token, and the number of mass signals.

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
    return narrow, len(signals.mass) + len(signals.layer_mass)
