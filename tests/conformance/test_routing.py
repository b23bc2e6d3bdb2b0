"""Masked routing on the device against the exact reference, for every family of routers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.device.mask import MaskedExperts
from guard.device.routing import route_masked
from guard.program.reference_routing import route
from guard.program.topology import MoELayer, Router

ROWS = 6
CLOSE_CALL = 1e-4
"""Choices nearer than this may fall either way in float32, under biases of up to 35."""

FAMILIES: list[Any] = [
    ("softmax", Router(), 16, 4, None),
    ("softmax, not renormalised", Router(renormalize=False), 16, 4, None),
    ("softmax in groups", Router(renormalize=False, num_groups=4, topk_groups=2), 16, 3, None),
    ("sigmoid under a bias", Router("sigmoid", has_bias=True), 16, 4, (34.5, 0.14)),
    ("sigmoid under a bias in groups",
     Router("sigmoid", has_bias=True, num_groups=4, topk_groups=2), 16, 3, (7.0, 0.12)),
    ("softmax under a bias", Router(has_bias=True), 16, 4, (0.0, 0.1)),
    ("sqrtsoftplus under a bias", Router("sqrtsoftplus", has_bias=True), 16, 4, (3.0, 0.5)),
    ("sigmoid top-1", Router("sigmoid", renormalize=False), 16, 1, None),
    ("sparsemixer", Router(renormalize=False, kind="sparsemixer"), 16, 2, None),
    ("zero experts", Router(renormalize=False, has_bias=True, num_zero_experts=8), 16, 4, (0.0, 0.1)),
]  # fmt: skip


def masks_of(random: np.random.Generator, num_experts: int, top_k: int) -> np.ndarray:
    """bool [4, E]: rerouted, drop-renormed, dropped and forced experts, which may overlap."""
    masks = random.random((4, num_experts)) < random.choice([0.0, 0.2, 0.5], 4)[:, None]
    order = random.permutation(num_experts)
    masks[0, order[:top_k]] = False
    masks[3, order[random.integers(0, top_k + 1) :]] = False
    return masks


def disjoint(masks: np.ndarray) -> list[torch.Tensor]:
    """By precedence, as the device's masks come."""
    taken = np.zeros_like(masks[0])
    parts = []
    for part in masks:
        parts.append(torch.from_numpy(part & ~taken))
        taken = taken | part
    return parts


def is_close_call(logits: np.ndarray, bias: np.ndarray | None, scoring: str) -> bool:
    scores = {
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrtsoftplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }[scoring](logits)
    choice = np.sort(logits if bias is None else scores + bias)
    return bool((np.diff(choice) < CLOSE_CALL).any())


@pytest.mark.parametrize(
    ("router", "num_experts", "top_k", "bias"),
    [row[1:] for row in FAMILIES],
    ids=[row[0] for row in FAMILIES],
)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_device_routes_masked_rows_as_the_reference_does(
    router: Router, num_experts: int, top_k: int, bias: tuple[float, float] | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    columns = num_experts + router.num_zero_experts
    logits_TE = random.normal(random.choice([-6.0, 0.0, 3.0]), 2, (ROWS, columns)).astype(np.float32)
    bias_E = None
    if bias is not None:
        bias_E = (bias[0] + random.uniform(-bias[1], bias[1], columns)).astype(np.float32)
    masks_T = [masks_of(random, num_experts, top_k) for _ in range(ROWS)]
    rows = [disjoint(masks) for masks in masks_T]

    routed = route_masked(
        MoELayer(0, num_experts, top_k, router),
        torch.from_numpy(logits_TE),
        MaskedExperts(*(torch.stack(parts) for parts in zip(*rows, strict=True))),
        None if bias_E is None else torch.from_numpy(bias_E),
    )

    for row in range(ROWS):
        logits = logits_TE[row].astype(np.float64)
        if is_close_call(logits, None if bias_E is None else bias_E.astype(np.float64), router.scoring):
            continue
        lists = [np.flatnonzero(part).tolist() for part in masks_T[row]]
        names = ("rerouted", "drop_renormed", "dropped", "forced")
        try:
            expected = route(
                logits.tolist(),
                router,
                top_k,
                bias=None if bias_E is None else bias_E.tolist(),
                **dict(zip(names, lists, strict=True)),
            )
        except ValueError:
            continue  # too few experts in the kept groups, which the compiler refuses
        ids = routed.topk_ids_TK[row].tolist()
        weights = routed.gate_weights_TK[row].tolist()
        assert sorted(ids) == sorted(expert for expert, _ in expected)
        assert dict(zip(ids, weights, strict=True)) == {
            expert: pytest.approx(weight, rel=2e-5, abs=1e-30) for expert, weight in expected
        }
