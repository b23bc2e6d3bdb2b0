"""A kernel that routes inside itself and runs on a CPU, in the place of vLLM's own: for tests only.

On this CPU all kernels of vLLM's are modular; those that are not need an Arm or AMD Zen CPU or a GPU.
This one is made of the same two parts as those of the CPUs: vLLM's routing of CPUs, and one of its
grouped products behind it. It keeps whom it chose, which the guard cannot see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from guard_vllm.logit_masks import route_through_logits
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.router.cpu_router import select_experts

from tests.support.routing_recorder import WeightsRecorder

LOWEST = torch.finfo(torch.float32).min

_stock_kernels = unquantized.backend_to_kernel_cls


class RoutingKernel(mk.FusedMoEExpertsMonolithic):  # type: ignore[misc]
    """last_ids_TK: int32 [most rows of a step, k], whom the last call chose"""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        self.experts = _modular(moe_config)(moe_config, quant_config)
        self.renormalize = moe_config.routing_method is not RoutingMethodType.Default
        shape = (moe_config.max_num_tokens, moe_config.experts_per_token)
        self.last_ids_TK = torch.full(shape, -1, dtype=torch.int32)

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(cls: type, *config: Any) -> tuple[bool, str | None]:
        return True, None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.experts.process_weights_after_loading(layer)

    def route(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
        return select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            top_k=self.moe_config.experts_per_token,
            use_grouped_topk=False,
            renormalize=self.renormalize,
        )

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        topk_weights, topk_ids = self.route(hidden_states, router_logits)
        self.last_ids_TK[: len(topk_ids)] = topk_ids
        output = torch.empty_like(hidden_states)
        none = torch.empty(0)
        self.experts.apply(
            output,
            *(hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts),
            *(None, None, None, none, none, None, False),
        )
        return output

    def _supports_nothing(self) -> bool:
        raise AssertionError("`is_supported_config` asks nobody else")

    _supports_current_device = _supports_no_act_and_mul = _supports_quant_scheme = _supports_nothing
    _supports_activation = _supports_parallel_config = _supports_nothing


class DeafKernel(RoutingKernel):
    """Takes the best by logits of its own: masks do not reach it."""

    def route(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
        return super().route(hidden_states, router_logits.where(router_logits > LOWEST, 9.0))


def _modular(moe_config: Any) -> Any:
    form = mk.FusedMoEActivationFormat.Standard
    for kernel in _stock_kernels(unquantized.UnquantizedMoeBackend.CPU):
        if kernel.is_supported_config(kernel, moe_config, None, None, form)[0]:
            return kernel
    raise LookupError("vLLM has no kernel for this CPU and model")


@contextmanager
def instead_of_vllms(*kernels: type) -> Iterator[None]:
    """While it holds, vLLM knows only these kernels for layers that are not quantised."""
    unquantized.backend_to_kernel_cls = lambda _: list(kernels)
    try:
        yield
    finally:
        unquantized.backend_to_kernel_cls = _stock_kernels


class KernelRecorder(WeightsRecorder):
    """Its rows have a fourth entry: [layers, top_k] ids that the kernels chose. And faults that a test
    turns on and off while an eager engine runs."""

    def set_routing_fault(self, kind: str, layers: list[int], _: int | None) -> None:
        """kind: "uncalled", the kernels are called past the guard; "ignores_masks", without masks"""
        worker = self.moe_guard_status.__self__  # type: ignore[attr-defined]
        tap = worker._hooks.guard.tap
        self._sound = {index: worker._layers[index].runner.routed_experts for index in layers}
        self._guarded = {i: experts.forward_monolithic for i, experts in self._sound.items()}
        for index, experts in self._sound.items():
            del experts.forward_monolithic
            if kind == "ignores_masks":
                layer = worker._layers[index]
                experts.forward_monolithic = route_through_logits(
                    experts, layer.router, tap, None, index, layer.facts.top_k
                )

    def clear_routing_faults(self) -> None:
        for index, experts in self._sound.items():
            experts.forward_monolithic = self._guarded[index]

    def recorded_columns(self, guard: Any, num_rows: int) -> list[list[Any]]:
        ids = [
            layer.runner.routed_experts.quant_method.moe_kernel.fused_experts.last_ids_TK[:num_rows]
            for layer in self.moe_guard_status.__self__._layers  # type: ignore[attr-defined]
        ]
        return [*super().recorded_columns(guard, num_rows), torch.stack(ids, dim=1).tolist()]
