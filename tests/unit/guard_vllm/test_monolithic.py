"""Kernels that route inside themselves: vLLM's own choice among kernels, its own MoE layers, and what
the guard makes of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_vllm.kernel_proof import kernel_faults
from guard_vllm.logit_masks import why_not_enough, without
from guard_vllm.monolithic import REASON, guardable_kernels
from guard_vllm.routers import RoutedLayer, attach, routed_layers, topology_of
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.oracle import mxfp4, unquantized
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from guard.errors import UnsupportedHostError
from tests.support.routing_kernel import DeafKernel, RoutingKernel, instead_of_vllms
from tests.support.support_recorder import SupportRecord
from tests.unit.device.driving import MASK, Engine, policy_text, rule_text

MASKING = policy_text(rule_text("{always: {}}", MASK))
EXPERTS, TOP_K, HIDDEN, ROWS = 8, 2, 64, 6


class Kernel:
    @staticmethod
    def is_monolithic() -> bool:
        return False

    @staticmethod
    def is_supported_config(*_: Any) -> tuple[bool, str | None]:
        return True, None


class RoutesInside(Kernel):
    @staticmethod
    def is_monolithic() -> bool:
        return True


class RoutesInsideAndDecidesItself(RoutesInside):
    @staticmethod
    def is_supported_config(*_: Any) -> tuple[bool, str | None]:
        return True, "its own word"


def choose(monkeypatch: pytest.MonkeyPatch, *kernels: type) -> type:
    """What vLLM's loop over a back end's kernels takes, as the model is built."""
    monkeypatch.setattr(mxfp4, "backend_to_kernel_cls", lambda _: list(kernels))
    with guardable_kernels():
        _, chosen = mxfp4._return_or_raise(
            SimpleNamespace(value="a back end"),
            None,
            None,
            None,
            modular_kernel.FusedMoEActivationFormat.Standard,
        )
    found: type = chosen
    return found


@pytest.mark.parametrize("inside", [RoutesInside, RoutesInsideAndDecidesItself])
def test_a_modular_kernel_of_the_same_back_end_is_taken(
    monkeypatch: pytest.MonkeyPatch, inside: type
) -> None:
    assert choose(monkeypatch, inside, Kernel) is Kernel


def test_outside_of_a_layer_a_kernel_that_routes_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="MoE Guard cannot see it") as caught:
        choose(monkeypatch, RoutesInside)
    assert REASON in str(caught.value)


def test_behind_the_build_everything_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, method = mxfp4.backend_to_kernel_cls, RoutedExperts._get_quant_method
    choose(monkeypatch, RoutesInside, RoutesInsideAndDecidesItself, Kernel)
    monkeypatch.undo()
    with suppress(UnsupportedHostError):
        build(scoring_func="sigmoid")
    assert mxfp4.backend_to_kernel_cls is stock
    assert RoutedExperts._get_quant_method is method
    assert RoutesInside.is_supported_config() == (True, None)
    assert "is_supported_config" not in RoutesInside.__dict__
    assert RoutesInsideAndDecidesItself.is_supported_config() == (True, "its own word")
    assert RoutingKernel.is_supported_config(RoutingKernel) == (True, None)


@contextmanager
def vllm_config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def layer_of_vllm(number: int = 0, **options: Any) -> Any:
    """As a model builds one. Its experts have weights, and its kernel is set up."""
    name = f"model.layers.{number}.mlp.experts"
    arguments: dict[str, Any] = {
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "params_dtype": torch.float32,
        "prefix": name,
    }
    runner = FusedMoEFactory(**arguments | options, tp_size=1, dp_size=1, pcp_size=1)
    random = torch.Generator().manual_seed(number)
    for parameter in runner.routed_experts.parameters():
        parameter.data.normal_(0.0, 0.1, generator=random)
    runner.routed_experts.quant_method.process_weights_after_loading(runner.routed_experts)
    return runner


def build(*kernels: type, **options: Any) -> tuple[Any, dict[str, type]]:
    """A layer of a guarded model where vLLM knows only these kernels, and what was taken."""
    with vllm_config(), instead_of_vllms(*(kernels or (RoutingKernel,))), guardable_kernels() as taken:
        runner = layer_of_vllm(**options)
    return runner, taken


def test_where_vllm_has_no_other_kernel_the_one_that_routes_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", logger="guard_vllm.monolithic")
    runner, taken = build()

    assert runner.is_monolithic
    assert taken == {"model.layers.0.mlp.experts": RoutingKernel}
    assert "no kernel for 1 MoE layers but RoutingKernel" in caplog.text
    (layer,) = routed_layers(runner, taken=taken)
    assert layer.kernel is RoutingKernel
    assert layer.facts.router.is_in_kernel


def test_where_vllm_has_another_kernel_that_one_is_taken(
    caplog: pytest.LogCaptureFixture, support_record: SupportRecord
) -> None:
    support_record.feature("kernels that route inside: vLLM has another")
    caplog.set_level("INFO", logger="guard_vllm.monolithic")
    stock = unquantized.backend_to_kernel_cls(unquantized.UnquantizedMoeBackend.CPU)
    runner, taken = build(RoutingKernel, *stock)

    assert not runner.is_monolithic
    assert not taken
    assert "pass over kernels that route inside themselves: RoutingKernel" in caplog.text


def test_what_vllm_refuses_without_the_guard_it_refuses_in_its_own_words() -> None:
    class Unsupported(Kernel):
        @staticmethod
        def is_supported_config(*_: Any) -> tuple[bool, str | None]:
            return False, "there is no such GPU here"

    with pytest.raises(NotImplementedError, match="No Unquantized MoE backend supports") as caught:
        build(Unsupported)
    assert not isinstance(caught.value, UnsupportedHostError)
    assert caught.value.__context__ is None, "it is not asked a second time"


BIAS = torch.zeros(EXPERTS)
GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}


def routes(**_: Any) -> None:
    """A model's own routing."""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"renormalize": False}, "weights of the chosen experts are not renormalised"),
        ({"scoring_func": "sigmoid"}, "scored by sigmoid; the kernel .* method SigmoidRenorm"),
        ({"scoring_func": "sigmoid", "e_score_correction_bias": BIAS}, "a correction bias is added"),
        (GROUPS, "groups of experts are chosen first"),
        ({"custom_routing_function": routes}, "the model has a routing function of its own"),
        ({"apply_router_weight_on_input": True}, "weights are applied to the experts' input"),
    ],
)
def test_where_logits_are_not_enough_the_layer_is_refused_with_the_reason(
    options: dict[str, Any], reason: str, support_record: SupportRecord
) -> None:
    support_record.feature("kernels that route inside: logits are not enough", refused=REASON)
    with pytest.raises(UnsupportedHostError, match=reason) as caught:
        build(**options)
    for part in (REASON, "layer model.layers.0.mlp.experts but RoutingKernel", "--moe-backend"):
        assert part in str(caught.value)


def parallel(**differing: Any) -> dict[str, Any]:
    alone = {"dp_size": 1, "enable_eplb": False, "is_sequence_parallel": False, "use_ep": False}
    return {"moe_parallel_config": SimpleNamespace(**alone | differing)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_experts": EXPERTS + 2}, "copies of experts"),
        ({"has_hash_routing": True}, "a table from token ids"),
        ({"routing_method": RoutingMethodType.TopK}, "the routing method TopK"),
        (parallel(dp_size=2), "rows of other ranks"),
        (parallel(is_sequence_parallel=True), "rows of other ranks"),
        (parallel(enable_eplb=True), "moved about by load balancing"),
        (parallel(use_ep=True), "lie on several ranks"),
    ],
)
def test_what_the_kernel_was_set_up_for_counts_too(change: dict[str, Any], reason: str) -> None:
    runner, _ = build()
    assert why_not_enough(runner.routed_experts) is None
    for name, value in change.items():
        setattr(runner.moe_config, name, value)

    found = why_not_enough(runner.routed_experts)

    assert found is not None
    assert reason in found


def test_a_kernel_that_vllm_takes_behind_its_own_choice_is_refused() -> None:
    with vllm_config(), guardable_kernels() as taken:
        runner = layer_of_vllm()
    assert not runner.is_monolithic
    inside, _ = build()
    runner.routed_experts.quant_method.moe_kernel = inside.routed_experts.quant_method.moe_kernel

    with pytest.raises(UnsupportedHostError, match=r"its kernel RoutingKernel, .* although vLLM"):
        routed_layers(runner, taken=taken)


def test_a_kernel_that_changes_into_another_while_weights_are_processed_is_refused() -> None:
    runner, taken = build()
    other, _ = build(DeafKernel)
    runner.routed_experts.quant_method.moe_kernel = other.routed_experts.quant_method.moe_kernel

    with pytest.raises(UnsupportedHostError, match=r"DeafKernel, .* choice for it was RoutingKernel"):
        routed_layers(runner, taken=taken)


def test_a_router_that_is_no_plain_softmax_is_refused_whatever_the_layer_says() -> None:
    runner, taken = build()
    runner.router = CPURouter(TOP_K, EXPERTS, renormalize=False)

    with pytest.raises(UnsupportedHostError, match="its router CPURouter is no plain softmax"):
        routed_layers(runner, taken=taken)


class Guarded:
    """Two of vLLM's layers with a kernel that routes, attached to a guard whose policy masks expert 3
    of layer 0, and what the kernel was given."""

    def __init__(self, *, masking: bool = True, kernel: type = RoutingKernel) -> None:
        with vllm_config() as self.config, instead_of_vllms(kernel), guardable_kernels() as taken:
            self.runners = [layer_of_vllm(number) for number in range(2)]
        self.engine = Engine(MASKING, masking=masking)
        self.layers = routed_layers(torch.nn.ModuleList(self.runners), taken=taken)
        self.given: list[torch.Tensor] = []
        self.stock = [self.run(number) for number in range(2)]
        self.given.clear()
        attach(self.engine.guard, self.layers)

    def run(self, number: int, logits: torch.Tensor | None = None) -> torch.Tensor:
        runner = self.runners[number]
        kernel = runner.routed_experts.quant_method.moe_kernel.fused_experts
        kernel.route = self._keeping(type(kernel).route.__get__(kernel))
        with set_forward_context(None, self.config):
            output: torch.Tensor = runner(STATES, LOGITS if logits is None else logits)
        return output

    def _keeping(self, route: Any) -> Any:
        def keep(hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
            self.given.append(router_logits.clone())
            return route(hidden_states, router_logits)

        return keep

    def chosen(self, number: int) -> torch.Tensor:
        kernel: Any = self.runners[number].routed_experts.quant_method.moe_kernel.fused_experts
        ids: torch.Tensor = kernel.last_ids_TK[:ROWS]
        return ids


_random = torch.Generator().manual_seed(1)
LOGITS = torch.randn((ROWS, EXPERTS), generator=_random)
LOGITS[:, 3] = 9.0  # expert 3, which the policy masks, is everyone's first choice
LOGITS[1, 0] = -0.0
STATES = torch.randn((ROWS, HIDDEN), generator=_random)


def test_masked_rows_reroute_and_others_are_given_the_very_bits() -> None:
    guarded = Guarded()
    guard = guarded.engine.guard
    assert guard.mask is not None
    guard.mask.set_rows(torch.tensor([[True], [False]] * (ROWS // 2)))

    outputs = [guarded.run(number) for number in range(2)]

    first, second = guarded.given
    assert torch.equal(first[1::2].view(torch.int32), LOGITS[1::2].view(torch.int32))
    assert torch.equal(second.view(torch.int32), LOGITS.view(torch.int32))
    assert torch.equal(outputs[0][1::2], guarded.stock[0][1::2])
    assert torch.equal(outputs[1], guarded.stock[1])
    assert not (outputs[0][0::2] == guarded.stock[0][0::2]).all(dim=1).any()
    assert (guarded.chosen(0)[0::2] != 3).all()
    assert (guarded.chosen(0)[1::2] == 3).any(dim=1).all()
    ids_TLK, weights_TLK = guard.tap.topk_ids_TLK[:ROWS], guard.tap.topk_weights_TLK[:ROWS]
    for number in range(2):
        assert torch.equal(ids_TLK[:, number], guarded.chosen(number))
    without_3 = LOGITS.clone()
    without_3[0::2, 3] = torch.finfo(torch.float32).min
    best = without_3.topk(TOP_K).values.softmax(-1)
    torch.testing.assert_close(weights_TLK[:, 0].sort(descending=True).values, best)


def test_a_guard_that_only_observes_leaves_the_logits_alone() -> None:
    guarded = Guarded(masking=False)

    outputs = [guarded.run(number) for number in range(2)]

    assert all(map(torch.equal, outputs, guarded.stock))
    assert all(torch.equal(given, LOGITS) for given in guarded.given)
    assert torch.equal(guarded.engine.guard.tap.topk_ids_TLK[:ROWS, 1], guarded.chosen(1))


def test_a_kernel_that_obeys_its_logits_is_proved() -> None:
    assert kernel_faults(Guarded().layers) == []


def test_a_kernel_that_masks_do_not_reach_is_found_by_what_it_computes() -> None:
    assert [fault.partition(":")[0] for fault in kernel_faults(Guarded(kernel=DeafKernel).layers)] == [
        f"layer {number} does not use the experts that its logits choose" for number in range(2)
    ]


def test_a_kernel_that_computes_no_numbers_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Guarded()
    nan = torch.full((TOP_K + 1, HIDDEN), float("nan"))
    monkeypatch.setattr(RoutingKernel, "apply", lambda *_, **__: nan)

    assert len(kernel_faults(guarded.layers)) == 2


def test_a_kernel_that_comes_to_route_inside_after_loading_is_found_at_the_proof() -> None:
    with vllm_config(), guardable_kernels():
        runner = layer_of_vllm()
    layers = routed_layers(runner)
    assert kernel_faults(layers) == []
    inside = Guarded()
    runner.routed_experts.quant_method.moe_kernel = inside.runners[
        0
    ].routed_experts.quant_method.moe_kernel

    assert kernel_faults(layers) == [
        "layer 0 has another kernel than when it was loaded: RoutingKernel (routes inside) and not one "
        "that its router routes for"
    ]


def test_a_kernel_that_comes_to_leave_routing_to_its_router_is_found_too() -> None:
    guarded = Guarded()
    with vllm_config(), guardable_kernels():
        modular = layer_of_vllm()
    quant_method = guarded.runners[1].routed_experts.quant_method
    quant_method.moe_kernel = modular.routed_experts.quant_method.moe_kernel

    (fault,) = kernel_faults(guarded.layers)
    assert fault.startswith("layer 1 has another kernel than when it was loaded: one that its router")


def test_layers_are_counted_as_any_others() -> None:
    facts = topology_of("X", Guarded().layers)
    assert facts.sizes == ((0, EXPERTS, TOP_K), (1, EXPERTS, TOP_K))
    assert all(layer.router.is_in_kernel for layer in facts.layers)
    assert not RoutedLayer(0, "layer.0", CPURouter(TOP_K, EXPERTS)).facts.router.is_in_kernel


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of few values, so that most places are tied, and a mask that leaves k experts or more."""
    kind = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    levels = st.integers(-3, 3).map(float) | st.sampled_from([-6e4, 6e4])
    rows = draw(st.lists(st.lists(levels, min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=4))
    masked = [
        draw(st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(_leaves_enough))
        for _ in rows
    ]
    return torch.tensor(rows).to(kind), torch.tensor(masked)


def _leaves_enough(masked: list[bool]) -> bool:
    return masked.count(False) >= TOP_K


@given(tied_rows(), st.booleans(), st.booleans())
def test_however_a_kernel_breaks_ties_no_masked_expert_has_weight_and_gate_weights_are_the_taps(
    rows: tuple[torch.Tensor, torch.Tensor], highest_id_first: bool, softmax_first: bool
) -> None:
    logits_TE, masked_TE = rows
    given = without(logits_TE, masked_TE)
    assert torch.equal(given[~masked_TE].view(torch.uint8), logits_TE[~masked_TE].view(torch.uint8))
    tap_weights, tap_ids = CPURouter(TOP_K, EXPERTS)._compute_routing(given, given, None)

    scores_TE = given.float().softmax(-1) if softmax_first else given.float()
    order = scores_TE.flip(1) if highest_id_first else scores_TE
    best = order.sort(dim=1, descending=True, stable=True)
    ids_TK = best.indices[:, :TOP_K]
    ids_TK = EXPERTS - 1 - ids_TK if highest_id_first else ids_TK
    weights_TK = best.values[:, :TOP_K]
    weights_TK = (
        weights_TK / weights_TK.sum(1, keepdim=True) if softmax_first else weights_TK.softmax(1)
    )

    def has_weight_masked(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (masked_TE.gather(1, ids.long()) & (weights != 0)).any()

    assert not has_weight_masked(tap_ids, tap_weights)
    assert not has_weight_masked(ids_TK, weights_TK)
    torch.testing.assert_close(
        weights_TK.sort(1).values, tap_weights.sort(1).values, rtol=2e-2, atol=1e-6
    )
