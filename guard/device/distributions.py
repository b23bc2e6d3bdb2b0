"""Conditions on how a window's selections are distributed over all experts.

Letters beyond those of `layout`: D such conditions, V windows, H named ones, J rows of a request that
are evaluated, C = L·K places of a token's experts, Q tokens that a slot keeps, N tokens of
a window. An expert is kept as its id + 1, and nobody as 0.

Counts are whole numbers, and so is what is added up of them: a value does not depend on the batch or on
chunks, to its last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guard.device.layout import NULL_SLOT
from guard.device.rows import FreshRows, StepBatch
from guard.device.state import SlotState
from guard.program.distribution_table import DistributionTable, Statistic
from guard.program.program import WindowKind

_TERM_SCALE: Final = 2.0**50
_VALUE_SCALE: Final = 2.0**44
"""What terms below 1, and values up to the number of experts, are multiplied by to be added as whole
numbers. What that rounds off is far below `verdict.CLOSE`."""

_NUMBERS_AT_ONCE: Final = 2**22
"""Of a temporary tensor; layers are taken in groups, so that it is not exceeded by much."""


def expert_dtype(table: DistributionTable) -> torch.dtype:
    return torch.uint8 if table.expert_type == np.uint8 else torch.int16


def pack_experts(chosen_TC: torch.Tensor, num_words: int) -> torch.Tensor:
    """int64 [T, num_words], as columns of the evidence. Of ranks that have other layers each, the words
    add up to those of all layers."""
    bytes_TX = chosen_TC.contiguous().view(torch.uint8)
    padding = num_words * 8 - bytes_TX.shape[1]
    return torch.nn.functional.pad(bytes_TX, (0, padding)).contiguous().view(torch.int64)


def unpack_experts(words_TX: torch.Tensor, table: DistributionTable) -> torch.Tensor:
    """[T, C] of `expert_dtype`."""
    values = words_TX.contiguous().view(expert_dtype(table))
    return values[:, : table.chosen_per_token]


class BaselineTerms(NamedTuple):
    """What a profile's shares bring to a divergence, as whole numbers (`_TERM_SCALE`).

    half_entropy_ZL: int64, half the entropy of the shares
    is_measured_ZL: bool, the profile knows the layer
    unchosen_ZLE: int64, the term of an expert that a window never chose
    """

    half_entropy_ZL: NDArray[np.int64]
    is_measured_ZL: NDArray[np.bool_]
    unchosen_ZLE: NDArray[np.int64]


def baseline_terms(shares_ZLE: NDArray[np.float64]) -> BaselineTerms:
    shares = torch.from_numpy(shares_ZLE)
    half_term_ZLE = -torch.xlogy(shares, shares) / 2
    unchosen_ZLE = -torch.xlogy(shares / 2, shares / 2)
    return BaselineTerms(
        _whole(half_term_ZLE).sum(dim=-1).numpy(),
        (shares > 0).any(dim=-1).numpy(),
        _whole(unchosen_ZLE).numpy(),
    )


def _whole(term: torch.Tensor) -> torch.Tensor:
    return (term * _TERM_SCALE).round().to(torch.int64)


class _Step(NamedTuple):
    """A step's rows, and those of which values are wanted: P-1 and output positions among the last
    rows of each request.

    chosen_TLK: experts, of `expert_dtype`
    seen_TV: bool, the row is fresh and the window's epoch has seen it
    row_BJ: int64, the j-th before the request's last accepted row
    is_own_BJ: bool, that is one of its fresh rows
    is_wanted_BJ: bool
    """

    chosen_TLK: torch.Tensor
    seen_TV: torch.Tensor
    row_BJ: torch.Tensor
    is_own_BJ: torch.Tensor
    is_wanted_BJ: torch.Tensor
    batch: StepBatch
    fresh: FreshRows

    def of_layers(self, layers: slice) -> _Step:
        return self._replace(chosen_TLK=self.chosen_TLK[:, layers])


class DistributionEvaluator:
    """Evaluates the conditions of a `DistributionTable` and keeps what they need in the slots.

    Of a request's rows the last 1 + `max_draft_tokens` accepted ones can be evaluated: an engine
    samples behind no others. Where a request recomputes output that a failed step left unseen, more of
    them come at once, and the condition is unknown at those further back.
    """

    def __init__(
        self,
        table: DistributionTable,
        token_epochs: Sequence[int],
        device: torch.device,
        max_draft_tokens: int,
    ) -> None:
        """token_epochs: of the program's token signals, ascending"""

        def put(array: object) -> torch.Tensor:
            return torch.as_tensor(array, device=device)

        self._table = table
        self._device = device
        self._num_rows = 1 + max_draft_tokens
        layers = table.topology.layers
        self._num_layers, self._num_experts = len(layers), table.topology.max_experts
        self._top_k = table.topology.max_top_k
        self._chosen_of_window = self._top_k * int(table.tokens.max(initial=0))
        self._num_experts_L = put([layer.num_experts for layer in layers])
        self._top_k_L = put([layer.top_k for layer in layers])
        self._shares_ZLE = put(table.shares)
        terms = baseline_terms(table.shares)
        self._half_entropy_ZL = put(terms.half_entropy_ZL)
        self._is_measured_ZL = put(terms.is_measured_ZL)
        self._takes_max_D11 = put(table.takes_max)[:, None, None]
        self._token_signal_V = put(table.token_signal)
        self._token_epoch_N = put(np.array(token_epochs, dtype=np.int32))
        self._named = [
            (window, kind)
            for window, kind in enumerate(table.window.tolist())
            if kind != WindowKind.RECENT
        ]

    def read(
        self,
        chosen_TC: torch.Tensor,
        signal_TX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        state: SlotState,
    ) -> torch.Tensor:
        """float64 [T, D]; NaN where unknown. The state is that before the step.

        chosen_TC: of `unpack_experts`; signal_TX: all 0 where a row is not fresh
        """
        step = self._step(chosen_TC, signal_TX, batch, fresh)
        num_requests, of_request = len(batch.slots_B), max(self._num_experts, self._chosen_of_window)
        size = self._group_size(max(num_requests * of_request, len(chosen_TC) * self._top_k))
        groups = [
            self._of_layers(slice(first, first + size), step, state)
            for first in range(0, self._num_layers, size)
        ]
        value_DBJL = torch.cat(groups, dim=-1)
        value_DBJ = self._reduced(value_DBJL).where(step.is_wanted_BJ, float("nan"))
        dustbin = len(chosen_TC)
        value_TD = value_DBJ.new_full((dustbin + 1, len(value_DBJ)), float("nan"))
        at_N = step.row_BJ.where(step.is_wanted_BJ, dustbin).flatten()
        value_TD[at_N] = value_DBJ.flatten(1).T
        return value_TD[:dustbin]

    def keep(
        self,
        chosen_TC: torch.Tensor,
        signal_TX: torch.Tensor,
        batch: StepBatch,
        fresh: FreshRows,
        state: SlotState,
    ) -> None:
        """Count the step's rows in the slots, and keep the experts of the last of them."""
        if self._named:
            self._count(self._step(chosen_TC, signal_TX, batch, fresh), state)
        kept = state.recent_position_SQ.shape[1]
        if kept:
            is_last_T = batch.position_T >= fresh.after_B[batch.request_T] - kept
            slot_T = fresh.slot_T.where(is_last_T & fresh.judged_T, NULL_SLOT)
            place_T = batch.position_T.remainder(kept)
            seen_TN = (signal_TX[:, : len(self._token_epoch_N)] != 0).to(torch.int32)
            state.recent_chosen_SQC[slot_T, place_T] = chosen_TC
            state.recent_position_SQ[slot_T, place_T] = batch.position_T
            state.recent_epoch_SQ[slot_T, place_T] = (seen_TN * self._token_epoch_N).amax(dim=1)

    def _group_size(self, numbers_of_layer: int) -> int:
        """Layers that are taken at once."""
        return min(self._num_layers, max(1, _NUMBERS_AT_ONCE // max(1, numbers_of_layer)))

    def _step(
        self, chosen_TC: torch.Tensor, signal_TX: torch.Tensor, batch: StepBatch, fresh: FreshRows
    ) -> _Step:
        back_J = torch.arange(self._num_rows, device=self._device)
        row_BJ = fresh.last_row_B[:, None] - back_J
        is_own_BJ = row_BJ >= batch.query_start_B1[:-1, None]
        row_BJ = row_BJ.clamp(min=0)
        is_own_BJ = is_own_BJ & fresh.fresh_T[row_BJ]
        from_end_BJ = batch.position_T[row_BJ] >= fresh.prompt_B[:, None] - 1
        return _Step(
            chosen_TC.view(-1, self._num_layers, self._top_k),
            signal_TX[:, self._token_signal_V] != 0,
            row_BJ,
            is_own_BJ,
            is_own_BJ & fresh.judged_T[row_BJ] & from_end_BJ,
            batch,
            fresh,
        )

    def _of_layers(self, layers: slice, step: _Step, state: SlotState) -> torch.Tensor:
        """float64 [D, B, J, layers]: each condition's number of each layer, NaN where there is none."""
        part = step.of_layers(layers)
        counts_BHLE = self._counted(layers, part, state)
        of_rows = []
        for back in range(self._num_rows):
            of_windows = []
            for window, kind in enumerate(self._table.window.tolist()):
                if kind == WindowKind.RECENT:
                    of_windows.append(self._recent(window, layers, part, back, state))
                else:
                    of_windows.append(counts_BHLE[:, self._table.histogram[window], :, 1:])
            of_rows.append(self._statistics(layers, of_windows))
            if back + 1 < self._num_rows:
                self._take_back(counts_BHLE, part, back)
        return torch.stack(of_rows, dim=2)

    def _counts_T(self, step: _Step, window: int, kind: int) -> torch.Tensor:
        """bool [T]: rows that a named window counts."""
        in_prompt_T = step.batch.position_T < step.fresh.prompt_T
        seen_T = step.seen_TV[:, window]
        match kind:
            case WindowKind.PROMPT:
                return seen_T & in_prompt_T
            case WindowKind.OUTPUT:
                return seen_T & ~in_prompt_T
            case _:
                return seen_T

    def _counted(self, layers: slice, part: _Step, state: SlotState) -> torch.Tensor:
        """int32 [B, H, layers, 1 + E]: the histograms behind the step's last rows; 0 is nobody."""
        kept_BHLE = state.histogram_SHLE[:, :, layers].index_select(0, part.batch.slots_B)
        counts_BHLE = torch.nn.functional.pad(kept_BHLE, (1, 0))
        num_layers, width = counts_BHLE.shape[2:]
        layer_L1 = torch.arange(num_layers, device=self._device)[:, None]
        ones = torch.ones((), dtype=torch.int32, device=self._device)
        for number, (window, kind) in enumerate(self._named):
            counts_T = self._counts_T(part, window, kind)
            row_T = part.batch.request_T * len(self._named) + number
            index_TLK = (row_T[:, None, None] * num_layers + layer_L1) * width
            index_TLK = index_TLK + part.chosen_TLK * counts_T[:, None, None]
            counts_BHLE.view(-1).scatter_add_(0, index_TLK.flatten(), ones.expand(index_TLK.numel()))
        return counts_BHLE

    def _take_back(self, counts_BHLE: torch.Tensor, part: _Step, back: int) -> None:
        """The histograms before each request's `back`-th last row instead of behind it."""
        row_B, is_own_B = part.row_BJ[:, back], part.is_own_BJ[:, back]
        for number, (window, kind) in enumerate(self._named):
            counts_B = is_own_B & self._counts_T(part, window, kind)[row_B]
            index_BLK = part.chosen_TLK[row_B].to(torch.int64) * counts_B[:, None, None]
            minus_BLK = torch.full_like(index_BLK, -1, dtype=torch.int32)
            counts_BHLE[:, number].scatter_add_(2, index_BLK, minus_BLK)

    def _recent(
        self, window: int, layers: slice, part: _Step, back: int, state: SlotState
    ) -> torch.Tensor:
        """int32 [B, layers, E]: of the last tokens up to each request's `back`-th last row."""
        batch, fresh, row_B = part.batch, part.fresh, part.row_BJ[:, back]
        back_N = torch.arange(int(self._table.tokens[window]), device=self._device)
        position_BN = batch.position_T[row_B][:, None] - back_N
        first_B = fresh.prompt_B if self._table.in_output[window] else torch.zeros_like(fresh.prompt_B)
        in_window_BN = position_BN >= first_B[:, None]
        in_step_BN = in_window_BN & (position_BN >= fresh.begin_B[:, None])
        here_BN = (row_B[:, None] - back_N).clamp(min=0)
        seen_BN = in_step_BN & part.seen_TV[:, window][here_BN]
        expert_BNLK = part.chosen_TLK[here_BN]
        kept = state.recent_position_SQ.shape[1]
        if kept:
            place_BN = position_BN.remainder(kept)
            slots_B1 = batch.slots_B[:, None]
            # What a place holds may be of a position further back, where later ones were unseen.
            is_kept_BN = state.recent_position_SQ[slots_B1, place_BN] == position_BN
            is_kept_BN &= state.recent_epoch_SQ[slots_B1, place_BN] >= self._table.epochs[window]
            is_kept_BN &= in_window_BN & ~in_step_BN
            places = slice(layers.start * self._top_k, layers.stop * self._top_k)
            past_BNLK = state.recent_chosen_SQC[slots_B1, place_BN, places].view(expert_BNLK.shape)
            expert_BNLK = expert_BNLK.where(in_step_BN[:, :, None, None], past_BNLK)
            seen_BN = seen_BN | is_kept_BN
        index_BLI = (expert_BNLK * seen_BN[:, :, None, None]).transpose(1, 2).flatten(2)
        counts_BLE = torch.zeros(
            (*index_BLI.shape[:2], 1 + self._num_experts), dtype=torch.int32, device=self._device
        )
        ones = torch.ones((), dtype=torch.int32, device=self._device).expand(index_BLI.shape)
        counts_BLE.scatter_add_(2, index_BLI.to(torch.int64), ones)
        return counts_BLE[..., 1:]

    def _statistics(self, layers: slice, of_windows: list[torch.Tensor]) -> torch.Tensor:
        """float64 [D, B, layers]; see `Statistic`."""
        table = self._table
        values = []
        totals_BL = [counts_BLE.sum(dim=-1) for counts_BLE in of_windows]
        for window, statistic, baseline in zip(
            table.condition_window.tolist(),
            table.statistic.tolist(),
            table.baseline.tolist(),
            strict=True,
        ):
            counts_BLE, total_BL = of_windows[window], totals_BL[window]
            match statistic:
                case Statistic.ENTROPY:
                    squares_BL = counts_BLE.to(torch.int64).square().sum(dim=-1)
                    value_BL = total_BL.square().to(torch.float64) / squares_BL
                case Statistic.CONCENTRATION:
                    most_BL = counts_BLE.amax(dim=-1) * self._num_experts_L[layers]
                    value_BL = most_BL.to(torch.float64) / (total_BL * self._top_k_L[layers])
                case _:
                    value_BL = self._divergence(counts_BLE, total_BL, baseline, layers)
            values.append(value_BL.where(total_BL > 0, float("nan")))
        return torch.stack(values)

    def _divergence(
        self, counts_BLE: torch.Tensor, total_BL: torch.Tensor, baseline: int, layers: slice
    ) -> torch.Tensor:
        """The entropy of the mean less the mean of the entropies. Their terms are added as whole
        numbers, which come to the same in any order."""
        p_BLE = counts_BLE.to(torch.float64) / total_BL.clamp(min=1)[:, :, None]
        mean_BLE = (p_BLE + self._shares_ZLE[baseline, layers]) / 2
        term_BLE = torch.xlogy(p_BLE, p_BLE) / 2 - torch.xlogy(mean_BLE, mean_BLE)
        whole_BL = _whole(term_BLE).sum(dim=-1)
        value_BL = (whole_BL - self._half_entropy_ZL[baseline, layers]).clamp(min=0).to(
            torch.float64
        ) / _TERM_SCALE
        return value_BL.where(self._is_measured_ZL[baseline, layers], float("nan"))

    def _reduced(self, value_DBJL: torch.Tensor) -> torch.Tensor:
        """float64 [D, B, J]: the greatest or the mean of the layers that have a number."""
        known_DBJL = ~value_DBJL.isnan()
        num_DBJ = known_DBJL.sum(dim=-1)
        whole_DBJL = (value_DBJL.where(known_DBJL, 0.0) * _VALUE_SCALE).round().to(torch.int64)
        mean_DBJ = whole_DBJL.sum(dim=-1).to(torch.float64) / _VALUE_SCALE / num_DBJ
        most_DBJ = value_DBJL.where(known_DBJL, float("-inf")).amax(dim=-1)
        return torch.where(self._takes_max_D11, most_DBJ, mean_DBJ).where(num_DBJ > 0, float("nan"))

    def _count(self, step: _Step, state: SlotState) -> None:
        size = self._group_size(len(step.chosen_TLK) * self._top_k)
        histogram = state.histogram_SHLE.view(-1)
        ones = torch.ones((), dtype=torch.int32, device=self._device)
        for first in range(0, self._num_layers, size):
            part_TLK = step.chosen_TLK[:, first : first + size].to(torch.int64)
            layer_L1 = torch.arange(first, first + part_TLK.shape[1], device=self._device)[:, None]
            for number, (window, kind) in enumerate(self._named):
                counts_T = self._counts_T(step, window, kind)
                counts_TLK = counts_T[:, None, None] & (part_TLK > 0)
                slot_TLK = step.batch.slot_T[:, None, None].where(counts_TLK, NULL_SLOT)
                row_TLK = (slot_TLK * len(self._named) + number) * self._num_layers + layer_L1
                index_TLK = row_TLK * self._num_experts + (part_TLK - 1).clamp(min=0)
                histogram.scatter_add_(0, index_TLK.flatten(), ones.expand(index_TLK.numel()))
