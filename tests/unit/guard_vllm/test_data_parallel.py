"""Whose rows a layer routes under data parallelism, and which masks come with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from guard_vllm import data_parallel
from guard_vllm.data_parallel import RoutedRows, routed_rows
from guard_vllm.routers import RoutedLayer, attach
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from guard.errors import UnsupportedHostError
from tests.unit.device.driving import MASK, Engine, policy_text, rule_text

MASKING = policy_text(rule_text("{always: {}}", MASK))
FLAGGED = 3
RANK, SIZES = 1, (2, 4)
OTHER, OWN = slice(0, 2), slice(2, 6)
LOGITS = torch.randn((6, 8), generator=torch.Generator().manual_seed(1))
LOGITS[:, FLAGGED] = 9.0  # what the policy masks is everyone's first choice
HIDDEN = torch.zeros((6, 4))


class Runner:
    """vLLM's runner of a layer, with another engine's rows ahead of this one's."""

    def __init__(self, *, naive: bool = True, engines: int = 2) -> None:
        self.moe_config = SimpleNamespace(dp_size=engines, is_sequence_parallel=False)
        self.layer_name = "layer"
        self.do_naive_dispatch_combine = naive

    def _maybe_dispatch(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.do_naive_dispatch_combine:
            return hidden_states, router_logits
        return HIDDEN, LOGITS


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two engines. What was sent beside the rows is in `sent`; the other engine's rows are masked."""

    def dispatch(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, extra_tensors: Any = None
    ) -> tuple[Any, ...]:
        sent.append(extra_tensors)
        return HIDDEN, LOGITS, [torch.cat([torch.ones_like(bits[:2]), bits]) for bits in extra_tensors]

    sent: list[Any] = []
    both = SimpleNamespace(rank_in_group=RANK, sent=sent, dispatch_router_logits=dispatch)
    metadata = SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: list(SIZES))
    found = {
        "get_ep_group": both,
        "get_dp_group": both,
        "get_forward_context": SimpleNamespace(dp_metadata=metadata),
    }

    def seam(owner: Any, name: str) -> Any:
        return (lambda: found[name]) if name in found else getattr(owner, name)

    monkeypatch.setattr(data_parallel, "seam", seam)
    return both


def attached(runner: Runner, *, masking: bool = True) -> tuple[Engine, CPURouter]:
    engine = Engine(MASKING, masking=masking)
    runners = [runner, Runner()]
    routers = [CPURouter(top_k=2, global_num_experts=8) for _ in range(2)]
    layers: Any = [RoutedLayer(n, f"layer.{n}", routers[n], 8, runners[n]) for n in range(2)]
    attach(engine.guard, layers)
    return engine, routers[0]


def route(runner: Runner, router: Any, logits: torch.Tensor) -> torch.Tensor:
    hidden_states, router_logits = runner._maybe_dispatch(HIDDEN[: len(logits)], logits)
    _, ids = router._compute_routing(hidden_states, router_logits, torch.int64)
    return cast(torch.Tensor, ids)


def test_each_engines_rows_obey_its_own_masks(group: Any) -> None:
    runner = Runner()
    engine, router = attached(runner)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.tensor([[False], [True], [False], [False]]))

    ids = route(runner, router, LOGITS[OWN])

    masked = [True, True, False, True, False, False]
    assert (ids != FLAGGED).all(dim=1).tolist() == masked
    assert [len(bits) for [bits] in group.sent] == [4], "only this engine's rows are sent"


def test_the_tap_keeps_this_engines_rows(group: Any) -> None:
    runner = Runner()
    engine, router = attached(runner)

    ids = route(runner, router, LOGITS[OWN])

    tap = engine.guard.tap
    assert torch.equal(tap.topk_ids_TLK[:4, 0], ids[OWN].to(torch.int32))
    assert (tap.topk_ids_TLK[4:, 0] == -1).all()


def test_without_masks_nothing_travels_and_the_tap_keeps_this_engines_rows(group: Any) -> None:
    runner = Runner()
    engine, router = attached(runner, masking=False)

    ids = route(runner, router, LOGITS[OWN])

    assert group.sent == []
    assert torch.equal(engine.guard.tap.topk_ids_TLK[:4, 0], ids[OWN].to(torch.int32))


def test_a_layer_whose_kernel_exchanges_routed_rows_routes_the_steps_own(group: Any) -> None:
    runner = Runner(naive=False)
    engine, router = attached(runner)
    assert engine.guard.mask is not None
    engine.guard.mask.set_rows(torch.tensor([[False], [True], [False], [False]]))

    ids = route(runner, router, LOGITS[OWN])

    assert (ids != FLAGGED).all(dim=1).tolist() == [False, True, False, False]
    assert torch.equal(engine.guard.tap.topk_ids_TLK[:4, 0], ids.to(torch.int32))
    assert group.sent == []


def test_one_engine_alone_stays_as_it_is() -> None:
    runner = Runner(engines=1)
    stock = runner._maybe_dispatch
    rows = routed_rows(runner, None)
    assert runner._maybe_dispatch == stock
    assert rows.own == RoutedRows(None).own == slice(None)


def test_a_layer_that_splits_rows_over_ranks_is_refused() -> None:
    runner = Runner()
    runner.moe_config.is_sequence_parallel = True
    with pytest.raises(UnsupportedHostError, match="sequence-parallel experts"):
        routed_rows(runner, None)
