"""The running check: can what the routers reported in this step be true, and were its masks obeyed?

Reads the tap after a forward, as the evidence does, and leaves a few whole numbers for the step's
report. Letters: F kinds of finding (`Finding`), others as in `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from guard.device.findings import CheckFindings, FindingsForm
from guard.device.kernels.choice import has_kernels
from guard.device.kernels.native.soundness import Soundness
from guard.device.mask import pack_bits
from guard.device.rows import StepBatch
from guard.device.tap import RoutingTap
from guard.program.program import MaskMethodCode, MaskTable, unpack_bits
from guard.program.step_report import Finding
from guard.program.topology import Topology

CHECK_EVERY_STEPS = 13
"""A step in so many is checked, the first one among them. A prime, so that no batch that comes in step
with powers of two always escapes; far below the 100 steps within which a fault must show."""


class LivenessCheck:
    """Checks every real row of a step; padding rows are behind them and never looked at.

    The tap was cleared before the forward, so what a layer did not write is -1 and not the last
    step's. No host synchronisation: what follows within the step follows on the device.

    form: in which findings travel between ranks
    is_due: the step that was begun is checked; whoever begins it says so
    soundness: the quick answer that there is nothing to find, where one can be given
    """

    def __init__(self, topology: Topology, masks: MaskTable, device: torch.device) -> None:
        num_layers, num_experts = len(topology.layers), topology.max_experts
        self._num_actions = masks.num_actions
        self.form = FindingsForm(num_layers, masks.num_actions)
        experts_L = np.array([layer.num_experts for layer in topology.layers], dtype=np.int32)
        top_k_L = np.array([layer.top_k for layer in topology.layers], dtype=np.int64)
        place_K = np.arange(topology.max_top_k)
        self._num_experts_L1 = torch.from_numpy(experts_L)[:, None].to(device)
        self._used_LK = torch.from_numpy(place_K < top_k_L[:, None]).to(device)
        self._is_here_L1 = torch.ones((num_layers, 1), dtype=torch.bool, device=device)
        self._no_expert_K = torch.from_numpy(-1 - place_K.astype(np.int32)).to(device)
        self._layer_offset_L1 = torch.arange(num_layers, device=device)[:, None] * num_experts
        self._nobody = num_layers * num_experts
        self._masks, self._device = masks, device
        self._sees = torch.ones((), dtype=torch.bool, device=device)
        self._sound_T1 = torch.ones((1, 1), dtype=torch.bool, device=device)
        self.is_due = False
        self.soundness = self._make_soundness(masks, device)
        if self.soundness is None:
            self._violations_of_masks  # noqa: B018 - made here, not in a step

    @cached_property
    def _violations_of_masks(self) -> tuple[_Excluding | None, _Forcing | None]:
        """Where all is sound, it is never looked for what is not."""
        masks, device = self._masks, self._device
        excluding = _Excluding(masks, device) if masks.num_actions else None
        forces = (masks.method == MaskMethodCode.FORCE).any()
        return excluding, _Forcing(masks, device) if forces else None

    def _make_soundness(self, masks: MaskTable, device: torch.device) -> Soundness | None:
        """On a CPU. Whether experts are missed that masks force, it does not know."""
        forces = (masks.method == MaskMethodCode.FORCE).any()
        if device.type != "cpu" or forces or not has_kernels(device):
            return None
        excluding_LEW = torch.from_numpy(masks.expert_bits) if masks.num_actions else None
        return Soundness(self._used_LK.sum(dim=1), self._num_experts_L1[:, 0].long(), excluding_LEW)

    def watch(self, layers: Sequence[int]) -> None:
        """Only these rows of the topology: the others' routers are on other ranks."""
        is_here_L1 = torch.zeros_like(self._is_here_L1)
        is_here_L1[list(layers)] = True
        self._is_here_L1 = is_here_L1
        self._use(self._used_LK & is_here_L1)

    def take_over(self, before: LivenessCheck) -> None:
        """Go on where the check of the program before stands: the same layers and trust."""
        self._is_here_L1 = before._is_here_L1
        self._use(before._used_LK)
        self._sees = before._sees

    def _use(self, used_LK: torch.Tensor) -> None:
        self._used_LK = used_LK
        if self.soundness is not None:
            self.soundness.used_L = used_LK.sum(dim=1)

    def check(
        self, tap: RoutingTap, batch: StepBatch, in_force_TA: torch.Tensor | None
    ) -> tuple[CheckFindings | None, torch.Tensor]:
        """What was found, if this step is checked, and the rows whose evidence can be trusted.

        Those are bool [T, 1], or one bool for all: the rows without a finding; and none at all while a
        layer is silent, which is from the check that says so to the first one that does not.

        in_force_TA: bool, the mask actions that each row was to obey; None where there are none
        """
        if not self.is_due:
            return None, self._sees
        if self._is_sound(tap, batch, in_force_TA):
            findings, sound_T1 = self.nothing_found(len(batch.slots_B)), self._sound_T1
        else:
            findings, sound_T1 = self._find(tap, batch, in_force_TA)
        self.hear(findings)
        return findings, sound_T1  # a silent layer is a finding in every row

    def _is_sound(self, tap: RoutingTap, batch: StepBatch, in_force_TA: torch.Tensor | None) -> bool:
        if self.soundness is None:
            return False
        words_TW = None if in_force_TA is None else pack_bits(in_force_TA)
        return self.soundness.holds(tap, len(batch.position_T), words_TW)

    def nothing_found(self, num_requests: int) -> CheckFindings:
        """What `check` says of a step in which all is sound."""
        num_layers = len(self._used_LK)
        return CheckFindings(
            torch.zeros((num_layers, Finding.NUM), dtype=torch.int64),
            torch.zeros(num_layers, dtype=torch.bool),
            torch.zeros((num_requests, Finding.NUM), dtype=torch.int64),
            torch.zeros(num_layers, dtype=torch.int64),
            torch.zeros((num_requests, self._num_actions), dtype=torch.int64),
        )

    @property
    def trusted(self) -> torch.Tensor:
        """bool: what `check` says of the rows of a step that is not checked. It changes in place."""
        return self._sees

    def hear(self, findings: CheckFindings) -> None:
        """Of all ranks that route the same rows: until the next check they trust the same ones."""
        self._sees.copy_(~findings.silent_L.any())

    def _find(
        self, tap: RoutingTap, batch: StepBatch, in_force_TA: torch.Tensor | None
    ) -> tuple[CheckFindings, torch.Tensor]:
        num_rows = len(batch.position_T)
        ids_TLK = tap.topk_ids_TLK[:num_rows]
        weights_TLK = tap.topk_weights_TLK[:num_rows]
        is_missing_TLK = (ids_TLK == -1) & self._used_LK
        is_expert_TLK = (ids_TLK >= 0) & (ids_TLK < self._num_experts_L1)
        is_finite_TLK = weights_TLK.isfinite()
        at_work_TLK = is_expert_TLK & is_finite_TLK & (weights_TLK != 0)
        # An id without weight may come twice: zero experts come back as expert 0 with weight 0.
        sorted_TLK = ids_TLK.where(at_work_TLK, self._no_expert_K).sort(dim=-1).values
        kinds: list[torch.Tensor] = [torch.empty(0)] * Finding.NUM
        kinds[Finding.MISSING] = is_missing_TLK.any(dim=-1)
        kinds[Finding.OUT_OF_RANGE] = (~is_expert_TLK & (ids_TLK != -1) & self._used_LK).any(dim=-1)
        kinds[Finding.NOT_FINITE] = (~is_finite_TLK & is_expert_TLK).any(dim=-1)
        kinds[Finding.DUPLICATE] = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any(dim=-1)
        findings_TLF = torch.stack(kinds, dim=-1)
        found_TF = findings_TLF.sum(dim=1)
        violations_L, violations_TA = self._violations(
            ids_TLK,
            at_work_TLK,
            kinds[Finding.MISSING] | kinds[Finding.OUT_OF_RANGE] | ~self._is_here_L1[:, 0],
            in_force_TA,
        )
        findings = CheckFindings(
            findings_TLF.sum(dim=0),
            ((ids_TLK == -1) & self._is_here_L1).all(dim=2).all(dim=0),
            _sum_of_request(found_TF, batch),
            violations_L,
            _sum_of_request(violations_TA, batch),
        )
        return findings, (found_TF == 0).all(dim=1, keepdim=True)

    def _violations(
        self,
        ids_TLK: torch.Tensor,
        at_work_TLK: torch.Tensor,
        unknown_TL: torch.Tensor,
        in_force_TA: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How often masks were not obeyed: int64 [L] in each layer, and [T, A] of each action.

        unknown_TL: bool, where not all that was chosen is known, so that no expert can be missed
        """
        num_rows, num_layers, _ = ids_TLK.shape
        device = ids_TLK.device
        excluding, forcing = self._violations_of_masks
        if in_force_TA is None or excluding is None:
            return (
                torch.zeros(num_layers, dtype=torch.int64, device=device),
                torch.zeros((num_rows, self._num_actions), dtype=torch.int64, device=device),
            )
        words_TW = pack_bits(in_force_TA)
        index_TLK = torch.where(at_work_TLK, ids_TLK + self._layer_offset_L1, self._nobody)
        by_layer_L, by_action_TA = excluding.violations(index_TLK, words_TW)
        if forcing is not None:
            missed_L, missed_TA = forcing.violations(ids_TLK, unknown_TL, words_TW)
            by_layer_L, by_action_TA = by_layer_L + missed_L, by_action_TA + missed_TA
        return by_layer_L, by_action_TA * in_force_TA


class _Excluding:
    """The actions under which an expert must have no weight. I: (layer, expert), the last is nobody."""

    def __init__(self, masks: MaskTable, device: torch.device) -> None:
        excludes_A = masks.method != MaskMethodCode.FORCE
        named_IA = unpack_bits(masks.expert_bits, masks.num_actions).reshape(-1, masks.num_actions)
        excluding_IA = torch.from_numpy(named_IA & excludes_A)
        excluding_IA = torch.cat([excluding_IA, torch.zeros_like(excluding_IA[:1])])
        self._by_action_IA = excluding_IA.to(device, torch.float32)
        self._words_IW = pack_bits(excluding_IA).to(device)

    def violations(
        self, index_TLK: torch.Tensor, words_TW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[L], and [T, A] whether in force or not. index_TLK: the I of each expert with weight."""
        by_action_TA = embedding_bag(index_TLK.flatten(1), self._by_action_IA, mode="sum")
        hit_TLK = (self._words_IW[index_TLK] & words_TW[:, None, None]).ne(0).any(dim=-1)
        return hit_TLK.sum(dim=(0, 2)), by_action_TA.to(torch.int64)


class _Forcing:
    """Experts that must be among the k, unless another mask excludes them. F: (layer, expert)."""

    def __init__(self, masks: MaskTable, device: torch.device) -> None:
        forces_A = masks.method == MaskMethodCode.FORCE
        named_LEA = unpack_bits(masks.expert_bits, masks.num_actions)
        layer_F, expert_F = np.nonzero((named_LEA & forces_A).any(axis=-1))
        named_FA = torch.from_numpy(named_LEA[layer_F, expert_F])
        forces = torch.from_numpy(forces_A)
        self._num_layers = len(named_LEA)
        self._layer_F = torch.from_numpy(layer_F).to(device)
        self._expert_F1 = torch.from_numpy(expert_F)[:, None].to(device)
        self._by_action_FA = (named_FA & forces).to(device, torch.float32)
        self._forcing_FW = pack_bits(named_FA & forces).to(device)
        self._excluding_FW = pack_bits(named_FA & ~forces).to(device)

    def violations(
        self, ids_TLK: torch.Tensor, unknown_TL: torch.Tensor, words_TW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_Excluding.violations`. By the id alone: a forced expert's own weight may be 0."""
        words_T1W = words_TW[:, None]
        is_wanted_TF = (words_T1W & self._forcing_FW).ne(0).any(dim=-1)
        is_wanted_TF = is_wanted_TF & (words_T1W & self._excluding_FW).eq(0).all(dim=-1)
        is_chosen_TF = (ids_TLK[:, self._layer_F] == self._expert_F1).any(dim=-1)
        is_missed_TF = is_wanted_TF & ~is_chosen_TF & ~unknown_TL[:, self._layer_F]
        by_layer_L = torch.zeros(self._num_layers, dtype=torch.int64, device=ids_TLK.device)
        by_layer_L = by_layer_L.index_add(0, self._layer_F, is_missed_TF.sum(dim=0))
        return by_layer_L, (is_missed_TF.float() @ self._by_action_FA).to(torch.int64)


def _sum_of_request(values_TX: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """int64 [B, X]."""
    sums_BX = torch.zeros(
        (len(batch.slots_B), values_TX.shape[1]), dtype=torch.int64, device=values_TX.device
    )
    return sums_BX.index_add_(0, batch.request_T, values_TX)
