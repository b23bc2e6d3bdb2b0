"""Which experts a row must not use: bits on rows, bits on experts, masked where they meet."""

from __future__ import annotations

import torch

from guard.device.layout import Capacity
from guard.program.program import WORD_BITS, MaskTable
from guard.program.topology import Topology


class ExpertMask:
    """Fixed buffers that the forward reads; any mix of masks in a batch costs the same.

    row_bits_TW: int64, the mask actions in force for each row of this step
    expert_bits_LEW: int64, the mask actions that mask each expert
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
        self._rows_in_use = 0

    def install(self, masks: MaskTable) -> None:
        """Take over a program's masks; its words must fit the capacity."""
        assert masks.num_words <= self.expert_bits_LEW.shape[-1], "provisioned for fewer masks"
        self.expert_bits_LEW.zero_()
        self.expert_bits_LEW[..., : masks.num_words] = torch.from_numpy(masks.expert_bits)

    def set_rows(self, in_force_TA: torch.Tensor) -> None:
        """The actions in force for the rows of the step that begins; rows behind them get none."""
        words_TW = pack_bits(in_force_TA)
        num_rows, num_words = words_TW.shape
        self.clear_rows()
        self.row_bits_TW[:num_rows, :num_words] = words_TW
        self._rows_in_use = num_rows

    def clear_rows(self) -> None:
        """No row is masked: for dummy runs, and before a step."""
        self.row_bits_TW[: self._rows_in_use].zero_()
        self._rows_in_use = 0

    def excluded(self, layer: int, num_rows: int) -> torch.Tensor:
        """bool [num_rows, E]: the experts that must not be chosen. Traced into compiled graphs."""
        rows_T1W = self.row_bits_TW[:num_rows].unsqueeze(1)
        experts_1EW = self.expert_bits_LEW[layer].unsqueeze(0)
        return (rows_T1W & experts_1EW).ne(0).any(dim=-1)


def pack_bits(flags_NA: torch.Tensor) -> torch.Tensor:
    """int64 [N, W] with action a at bit a % 64 of word a // 64; the sign bit is bit 63."""
    shifts_A = torch.arange(flags_NA.shape[1], device=flags_NA.device) % WORD_BITS
    bits_NA = flags_NA.to(torch.int64) << shifts_A
    words = [part.sum(dim=1) for part in bits_NA.split(WORD_BITS, dim=1)]
    return torch.stack(words, dim=1)  # one word of nothing where there are no actions


def reroute_logits(router_logits: torch.Tensor, excluded_TE: torch.Tensor) -> torch.Tensor:
    """Logits for a softmax top-k router under which excluded experts are never among the top k.

    Rows with nothing excluded keep their bits. Right only while each row keeps at least k experts,
    which the compiler has proved, and for routers whose selection score is the logit itself.
    """
    num_experts = router_logits.shape[-1]
    return torch.where(excluded_TE[:, :num_experts], float("-inf"), router_logits)
