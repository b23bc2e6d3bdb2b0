"""Masks of rows that come from other engines, whichever of two programs each engine is at.

Under data parallelism a layer routes the rows of all engines together, and an engine goes over to a new
program between two steps of its own. So the bits that travel with a row say by which program they are
meant: those of even generations lie in one half of the words, those of odd ones in the other. A program
is announced on every engine before any engine turns to it, and the next one is announced when all have
turned: until then no row has bits in the half that an announcement fills.
"""

from __future__ import annotations

import torch

_HALVES = 2


class SharedMasks:
    """Fixed buffers that the forward reads, as those of `ExpertMask`, with words X = 2 W.

    expert_bits_LEX, method_bits_MX: int64, of both halves
    is_in_force_2: int64, 1 for the half of the program in force here, else 0
    """

    def __init__(self, expert_bits_LEW: torch.Tensor, method_bits_MW: torch.Tensor) -> None:
        self._num_words = expert_bits_LEW.shape[-1]
        self.expert_bits_LEX = torch.zeros_like(expert_bits_LEW).repeat(1, 1, _HALVES)
        self.method_bits_MX = torch.zeros_like(method_bits_MW).repeat(1, _HALVES)
        self.is_in_force_2 = torch.zeros(_HALVES, dtype=torch.int64, device=expert_bits_LEW.device)

    def announce(
        self, expert_bits_LEW: torch.Tensor, method_bits_MW: torch.Tensor, generation: int
    ) -> None:
        """What rows of that generation mean, from any engine."""
        first = generation % _HALVES * self._num_words
        words = slice(first, first + self._num_words)
        self.expert_bits_LEX[..., words] = expert_bits_LEW
        self.method_bits_MX[:, words] = method_bits_MW

    def turn_to(self, generation: int) -> None:
        """This engine's rows are masked by that generation from now on."""
        self.is_in_force_2.zero_()
        self.is_in_force_2[generation % _HALVES] = 1

    def sent(self, row_bits_TW: torch.Tensor) -> torch.Tensor:
        """int64 [T, X]: this engine's bits as they travel. Traced into compiled graphs."""
        return (row_bits_TW.unsqueeze(1) * self.is_in_force_2[:, None]).flatten(1)
