"""Random weights that spread routing, put into any model that vLLM has built: for tests only.

vLLM's own `load_format="dummy"` gives weights so small that routing hardly spreads, and correction
biases near zero, which no real checkpoint has. `install` replaces what that load format puts in.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

LOGIT_SPREAD = 1.0
"""Standard deviation of the router logits: every expert is chosen often, none always."""

HASHED_EXPERTS = 16
"""What the table of hash layers points to."""

_CORRECTION_BIASES = ("e_score_correction_bias", "correction_bias", "expert_bias", "moe_statics")


def install(bias_mean: float, bias_half_spread: float) -> None:
    """For all models of this process from here on. The arguments are for correction biases."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.models import registry

    def load_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
        fill(model, (bias_mean, bias_half_spread))

    DummyModelLoader.load_weights = load_weights
    # vLLM looks at each new architecture in a process of its own, so that CUDA stays untouched: five
    # seconds each, and there is no CUDA here.
    registry._run_in_subprocess = lambda look: look()


def fill(model: torch.nn.Module, correction_bias: tuple[float, float]) -> None:
    """The same weights at each call: what a tensor gets depends on its name and shape alone."""
    for name, tensor in model.state_dict().items():
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor.copy_(_values(name, tensor, random, correction_bias).to(tensor.dtype))


def _values(
    name: str, tensor: torch.Tensor, random: torch.Generator, correction_bias: tuple[float, float]
) -> torch.Tensor:
    shape, last = tensor.shape, name.rpartition(".")[2]
    if not tensor.is_floating_point():
        if last == "tid2eid":  # hash layers: token id -> experts, all different
            rows, top_k = shape
            return (torch.arange(rows)[:, None] + torch.arange(top_k)) % HASHED_EXPERTS
        return torch.zeros(shape)
    uniform, normal = torch.rand(shape, generator=random), torch.randn(shape, generator=random)
    if any(part in name for part in _CORRECTION_BIASES):
        mean, half_spread = correction_bias
        return mean + half_spread * (2 * uniform - 1)
    if last in ("A_log", "A"):  # of a state space: the decay
        return uniform if last == "A_log" else -0.5 - uniform
    if "norm" in name or last == "D":
        return torch.zeros(shape) if last == "bias" else torch.ones(shape)
    if "scale" in last or "scalar" in last:
        return 0.5 + uniform
    if tensor.dim() < 2:
        return 0.1 * normal
    spread = LOGIT_SPREAD if _is_router(name) else 1.0
    return normal * (spread / math.sqrt(shape[-1]))


def _is_router(name: str) -> bool:
    return any(part in ("gate", "router", "classifier") for part in name.split(".")[-3:])
