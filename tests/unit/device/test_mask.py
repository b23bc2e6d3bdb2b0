"""Bits on rows meet bits on experts, and a router under them never chooses a masked expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.device.layout import Capacity
from guard.device.mask import ExpertMask, pack_bits, reroute_logits
from guard.program.program import MaskTable
from guard.program.topology import MoELayer, Topology

CPU = torch.device("cpu")


def mask_table(actions_LEA: np.ndarray) -> MaskTable:
    num_layers, num_experts, num_actions = actions_LEA.shape
    words = max(1, -(-num_actions // 64))
    bits = np.zeros((num_layers, num_experts, words), dtype=np.uint64)
    for layer, expert, action in zip(*actions_LEA.nonzero(), strict=True):
        bits[layer, expert, action // 64] |= np.uint64(1 << int(action % 64))
    zeros = np.zeros(num_actions, dtype=np.int64)
    return MaskTable(
        rule=zeros,
        method=zeros,
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
def test_excluded_is_a_boolean_product_of_rows_and_experts(seed: int, num_actions: int) -> None:
    random = np.random.default_rng(seed)
    topology = Topology("T", (MoELayer(0, 6, 2), MoELayer(4, 5, 2)))
    masks = mask_table(random.random((2, 6, num_actions)) < 2 / num_actions)
    rows_TA = random.random((7, num_actions)) < 0.3
    mask = ExpertMask(topology, Capacity(9, 1, masks.num_words + 1), CPU)
    mask.install(masks)

    mask.set_rows(torch.from_numpy(rows_TA))

    words = masks.expert_bits.view(np.uint64)
    for layer in range(2):
        experts_EA = np.array(
            [
                [(int(words[layer, e, a // 64]) >> (a % 64)) & 1 for a in range(num_actions)]
                for e in range(6)
            ]
        )
        expected = np.zeros((9, 6), dtype=bool)
        expected[:7] = rows_TA.astype(int) @ experts_EA.T > 0
        assert (mask.excluded(layer, 9).numpy() == expected).all()


def test_a_shorter_step_leaves_no_mask_on_the_rows_behind_it() -> None:
    mask = ExpertMask(Topology("T", (MoELayer(0, 4, 2),)), Capacity(8, 1, 1), CPU)
    mask.install(mask_table(np.ones((1, 4, 1), dtype=bool)))

    mask.set_rows(torch.ones((6, 1), dtype=torch.bool))
    mask.set_rows(torch.ones((2, 1), dtype=torch.bool))

    assert mask.excluded(0, 8)[:, 0].tolist() == [True] * 2 + [False] * 6


def test_installing_other_masks_forgets_the_old_ones() -> None:
    mask = ExpertMask(Topology("T", (MoELayer(0, 4, 2),)), Capacity(8, 1, 2), CPU)
    mask.install(mask_table(np.ones((1, 4, 65), dtype=bool)))
    mask.install(mask_table(np.eye(4, dtype=bool)[None, :, :1]))
    mask.row_bits_TW.fill_(-1)

    assert mask.excluded(0, 1).tolist() == [[True, False, False, False]]


@given(st.integers(0, 2**32 - 1))
def test_a_softmax_top_k_never_selects_a_masked_expert(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_experts = int(random.integers(2, 40))
    top_k = int(random.integers(1, num_experts + 1))
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    logits = torch.from_numpy(random.normal(0, 30, (16, num_experts))).to(dtype)
    excluded = np.zeros((16, num_experts), dtype=bool)
    for row in excluded[:12]:
        masked = random.integers(0, num_experts - top_k + 1)
        row[random.permutation(num_experts)[:masked]] = True

    rerouted = reroute_logits(logits, torch.from_numpy(excluded))
    # What has underflowed ties with what is masked at 0, so the choice is by logit, as vLLM's
    # kernels and the guard's proof have it; the weights are those of the softmax.
    ids = rerouted.float().topk(top_k, dim=-1).indices.numpy()

    assert not np.take_along_axis(excluded, ids, axis=1).any()
    untouched = torch.from_numpy(~excluded.any(axis=1))
    view = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(rerouted.view(view)[untouched], logits.view(view)[untouched])
    assert rerouted.dtype == logits.dtype


def test_rows_without_a_mask_keep_even_nans_and_negative_zeros() -> None:
    logits = torch.tensor([[float("nan"), -0.0, float("inf"), 1.0]])

    rerouted = reroute_logits(logits, torch.zeros((1, 8), dtype=torch.bool))

    assert torch.equal(rerouted.view(torch.int32), logits.view(torch.int32))
