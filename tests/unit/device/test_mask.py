"""Bits on rows meet bits on experts: what each method asks of each row's experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.device.layout import Capacity
from guard.device.mask import ExpertMask, pack_bits
from guard.program.program import MaskMethodCode, MaskTable
from guard.program.topology import MoELayer, Topology

CPU = torch.device("cpu")


def mask_table(actions_LEA: np.ndarray, method: np.ndarray | None = None) -> MaskTable:
    num_layers, num_experts, num_actions = actions_LEA.shape
    words = max(1, -(-num_actions // 64))
    bits = np.zeros((num_layers, num_experts, words), dtype=np.uint64)
    for layer, expert, action in zip(*actions_LEA.nonzero(), strict=True):
        bits[layer, expert, action // 64] |= np.uint64(1 << int(action % 64))
    zeros = np.zeros(num_actions, dtype=np.int64)
    return MaskTable(
        rule=zeros,
        method=zeros if method is None else method,
        release=zeros,
        tokens=zeros,
        static=zeros.astype(np.bool_),
        expert_bits=bits.view(np.int64),
    )


@pytest.mark.parametrize("num_actions", [1, 63, 64, 65, 128, 130])
def test_each_action_has_its_own_bit_the_sign_bit_included(num_actions: int) -> None:
    words = pack_bits(torch.eye(num_actions, dtype=torch.bool))

    assert words.shape == (num_actions, -(-num_actions // 64))
    for action, row in enumerate(words.numpy().view(np.uint64)):
        expected = [0] * words.shape[1]
        expected[action // 64] = 1 << (action % 64)
        assert row.tolist() == expected


def test_all_actions_together_fill_every_bit() -> None:
    words = pack_bits(torch.ones((1, 130), dtype=torch.bool)).numpy().view(np.uint64)

    assert words.tolist() == [[2**64 - 1, 2**64 - 1, 3]]


def test_no_actions_are_one_word_of_nothing() -> None:
    assert pack_bits(torch.zeros((5, 0), dtype=torch.bool)).tolist() == [[0]] * 5


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 63, 64, 65, 130]))
def test_an_expert_is_asked_for_by_the_first_method_in_force_that_names_it(
    seed: int, num_actions: int
) -> None:
    random = np.random.default_rng(seed)
    topology = Topology("T", (MoELayer(0, 6, 2), MoELayer(4, 5, 2)))
    named_LEA = random.random((2, 6, num_actions)) < 3 / num_actions
    method_A = random.integers(0, len(MaskMethodCode), num_actions)
    masks = mask_table(named_LEA, method_A)
    rows_TA = random.random((7, num_actions)) < 0.5
    mask = ExpertMask(topology, Capacity(9, 1, masks.num_words + 1), CPU)
    mask.install(masks)

    mask.set_rows(torch.from_numpy(rows_TA))

    for layer, facts in enumerate(topology.layers):
        wanted = mask.wanted(layer, mask.row_bits_TW)
        for row in range(9):
            for expert in range(facts.num_experts):
                in_force = rows_TA[row] & named_LEA[layer, expert] if row < 7 else np.zeros(0, bool)
                first = min(method_A[in_force.nonzero()[0]], default=None)
                asked = [bool(flags_TE[row, expert]) for flags_TE in wanted]
                assert asked == [method == first for method in MaskMethodCode]
        assert wanted.rerouted_TE.shape == (9, facts.num_experts)
        excluded_TE = wanted.rerouted_TE | wanted.drop_renormed_TE | wanted.dropped_TE
        assert torch.equal(wanted.excluded_TE, excluded_TE)
        assert wanted.applies_T1.squeeze(1).tolist() == [
            bool(row.any()) for row in excluded_TE | wanted.forced_TE
        ]


def test_a_shorter_step_leaves_no_mask_on_the_rows_behind_it() -> None:
    mask = ExpertMask(Topology("T", (MoELayer(0, 4, 2),)), Capacity(8, 1, 1), CPU)
    mask.install(mask_table(np.ones((1, 4, 1), dtype=bool)))

    mask.set_rows(torch.ones((6, 1), dtype=torch.bool))
    mask.set_rows(torch.ones((2, 1), dtype=torch.bool))

    assert mask.wanted(0, mask.row_bits_TW).rerouted_TE[:, 0].tolist() == [True] * 2 + [False] * 6


def test_installing_other_masks_forgets_the_old_ones() -> None:
    mask = ExpertMask(Topology("T", (MoELayer(0, 4, 2),)), Capacity(8, 1, 2), CPU)
    mask.install(mask_table(np.ones((1, 4, 65), dtype=bool)))
    mask.install(mask_table(np.eye(4, dtype=bool)[None, :, :1]))
    mask.row_bits_TW.fill_(-1)

    assert mask.wanted(0, mask.row_bits_TW[:1]).rerouted_TE.tolist() == [[True, False, False, False]]


def test_installing_other_masks_forgets_the_old_methods() -> None:
    mask = ExpertMask(Topology("T", (MoELayer(0, 4, 2),)), Capacity(8, 1, 2), CPU)
    mask.install(mask_table(np.ones((1, 4, 65), dtype=bool), np.full(65, MaskMethodCode.FORCE)))
    mask.install(mask_table(np.ones((1, 4, 1), dtype=bool)))
    mask.row_bits_TW.fill_(-1)

    wanted = mask.wanted(0, mask.row_bits_TW[:1])

    assert wanted.rerouted_TE.all()
    assert not wanted.forced_TE.any()
