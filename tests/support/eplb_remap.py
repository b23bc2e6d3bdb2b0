"""Routes the same rows under several EPLB maps, by vLLM's own mapping kernel; prints JSON.

    PYTHONPATH=tests/support/v2_on_cpu:. MOE_GUARD_TEST_V2=1 python tests/support/eplb_remap.py

vLLM defines the kernel for GPUs only: its source is read once more as on one, and Triton interprets it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

import torch
from guard_vllm.routers import RoutedLayer, attach, topology_of
from triton.runtime.interpreter import InterpreterBuilder
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform

from tests.unit.device.driving import MASK, Engine, policy_text, rule_text

EXPERTS, COPIES, ROWS, MASKED = 8, 4, 12, 3

MAPS: dict[str, list[list[int]]] = {
    "in order": [[e] for e in range(EXPERTS)],
    "reversed": [[EXPERTS - 1 - e] for e in range(EXPERTS)],
    # Expert 3 has copies, and lies where others lay before.
    "copies": [[8], [1, 9], [2], [0, 10, 11], [4], [5], [6], [7, 3]],
}


def as_on_a_gpu(module: ModuleType) -> Any:
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location("base_router_of_a_gpu", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again: Any = importlib.util.module_from_spec(spec)
    platform: Any = type(current_platform)
    stock = platform.is_cuda_alike
    platform.is_cuda_alike = lambda _: True
    try:
        spec.loader.exec_module(again)
    finally:
        platform.is_cuda_alike = stock
    return again


def remap(state: EplbLayerState, copies: list[list[int]]) -> None:
    """In place, as vLLM rearranges experts between two steps."""
    assert state.logical_to_physical_map is not None
    assert state.logical_replica_count is not None
    state.logical_to_physical_map.fill_(-1)
    for expert, places in enumerate(copies):
        state.logical_to_physical_map[expert, : len(places)] = torch.tensor(places)
        state.logical_replica_count[expert] = len(places)


def let_the_interpreter_add_under_a_mask() -> None:
    """It wants a boolean mask, as of stores; the kernel gives it an integer one."""
    builder: Any = InterpreterBuilder
    stock = builder.create_atomic_rmw

    def create_atomic_rmw(self: Any, operation: Any, at: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return stock(self, operation, at, value, mask, *rest)

    builder.create_atomic_rmw = create_atomic_rmw


def main() -> None:
    let_the_interpreter_add_under_a_mask()
    own: Any = base_router
    own.eplb_map_to_physical_and_record = as_on_a_gpu(base_router).eplb_map_to_physical_and_record
    state = EplbLayerState(
        expert_load_view=torch.zeros(EXPERTS + COPIES, dtype=torch.int32),
        logical_to_physical_map=torch.full((EXPERTS, COPIES), -1),
        logical_replica_count=torch.ones(EXPERTS, dtype=torch.int64),
        should_record_tensor=torch.tensor(True),
        num_unpadded_tokens_tensors=[torch.tensor(ROWS)],
    )
    routers: list[Any] = [
        CPURouter(top_k=2, global_num_experts=EXPERTS + COPIES, eplb_state=state) for _ in range(2)
    ]
    layers = [RoutedLayer(n, f"layer.{n}", router, EXPERTS) for n, router in enumerate(routers)]
    engine = Engine(policy_text(rule_text("{always: {}}", MASK)))
    attach(engine.guard, layers)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.tensor([[True], [False]] * (ROWS // 2)))
    logits = torch.randn((ROWS, EXPERTS), generator=torch.Generator().manual_seed(3))
    logits[:, MASKED] = 9.0
    found: dict[str, Any] = {
        "num_experts": [layer.num_experts for layer in topology_of("Test", layers).layers]
    }
    for name, copies in MAPS.items():
        remap(state, copies)
        weights, physical = routers[0].select_experts(
            hidden_states=torch.zeros((ROWS, 4)),
            router_logits=logits,
            topk_indices_dtype=torch.int64,
        )
        found[name] = {
            "physical": physical.tolist(),
            "weights": weights.tolist(),
            "tapped": engine.guard.tap.topk_ids_TLK[:ROWS, 0].tolist(),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
