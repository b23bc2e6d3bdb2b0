"""Shows of a kernel that routes inside itself that it obeys its logits, by what it computes.

Such a kernel does not say whom it chose, and what the tap holds of it is another's reading of its
logits. So at start each one computes one token in k + 1 ways: with all weight on each of the k experts
that are not masked, and with weights of all kinds among them, where masked ones would have come first.
The last must be the sum of the others by weight, as a softmax over k logits gives it. A kernel that
uses other experts, or weighs otherwise, says something else.

Experts of the same weights cannot be told apart so, and kernels of few bits round: what is looked for
is other experts, not other digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from guard_vllm.logit_masks import inside_kernel, without
from guard_vllm.routers import RoutedLayer

ALL_WEIGHT = 60.0
"""Apart by so much in their logits, all but the first have no weight that float32 would show."""

MASKED_AHEAD = 8.0
"""So much higher are the logits of masked experts, which then would take nearly all the weight."""

TOLERANCE = 0.25
"""Of the length of what is expected. Other experts are off by about the length itself, or by more."""

_SEED = 20261124


def kernel_faults(layers: Iterable[RoutedLayer]) -> list[str]:
    """What is wrong with the kernels of a rank's layers; behind a forward, which sets kernels up."""
    return [fault for layer in layers if (fault := _fault(layer)) is not None]


def _fault(layer: RoutedLayer) -> str | None:
    now = None if layer.runner is None else inside_kernel(layer.runner)
    if now is not layer.kernel:
        return (
            f"layer {layer.number} has another kernel than when it was loaded: {_routes(now)} and "
            f"not {_routes(layer.kernel)}"
        )
    if now is None:
        return None
    output_RH, expected_H = _computed(layer)
    if output_RH is None:
        return f"layer {layer.number}: {now.__name__} leaves its output unfinished, no proof"
    error = (output_RH[-1] - expected_H).norm()
    if bool(error <= TOLERANCE * expected_H.norm()):  # False for a NaN too
        return None
    return (
        f"layer {layer.number} does not use the experts that its logits choose: {now.__name__} "
        "computes something else where others are masked"
    )


def _routes(kernel: type | None) -> str:
    return "one that its router routes for" if kernel is None else f"{kernel.__name__} (routes inside)"


@torch.inference_mode()
def _computed(layer: RoutedLayer) -> tuple[torch.Tensor | None, torch.Tensor]:
    """[k + 1, H] what the kernel makes of the token, and [H] what the last row should be."""
    facts = layer.facts
    experts: Any = layer.runner.routed_experts  # type: ignore[union-attr]
    config = experts.moe_config
    random = torch.Generator().manual_seed(_SEED + layer.number)
    x_H = torch.randn(config.hidden_dim, generator=random)
    live_K = torch.randperm(facts.num_experts, generator=random)[: facts.top_k]
    logits_RE = torch.randn((facts.top_k + 1, facts.num_experts), generator=random)
    is_masked_E = torch.ones(facts.num_experts, dtype=torch.bool).index_fill(0, live_K, False)
    logits_RE[:, is_masked_E] += MASKED_AHEAD
    logits_RE[torch.arange(facts.top_k), live_K] += ALL_WEIGHT
    logits_RE = logits_RE.to(config.router_logits_dtype)
    output = type(experts).forward_monolithic(  # not the instance's, which is for rows of a step
        experts,
        x=x_H.to(config.device, config.in_dtype).expand(len(logits_RE), -1).contiguous(),
        router_logits=without(logits_RE, is_masked_E).to(config.device),
    )
    if not isinstance(output, torch.Tensor):
        return None, x_H
    output_RH = output.float().cpu()
    weight_K1 = logits_RE[-1, live_K].float().softmax(dim=-1)[:, None]
    return output_RH, (weight_K1 * output_RH[:-1]).sum(dim=0)
