"""What every step calls, as functions of Python: the same as by ctypes and by torch, only shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from guard.device.kernels.layer_routing import CpuLayerRouting, LayerRouting
from guard.device.kernels.native import build, interface
from guard.device.kernels.native.route_call import shortest_way
from guard.device.layout import Capacity
from guard.device.mask import ExpertMask
from guard.device.tap import RoutingTap
from guard.program.topology import MoELayer, Router, Topology
from tests.support.route_layer import CPU, make_routing
from tests.unit.device.driving import COUNT, FLAGGED, MASK, OTHER, Engine, fired, policy_text, rule_text

NUM_ROWS = 3


@pytest.fixture
def no_headers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where Python came without them."""
    monkeypatch.setattr(build, "_python_headers", list)
    build.extension.cache_clear()
    yield
    build.extension.cache_clear()


class Arguments(list[Any]):
    """Of a call. The operation reads buffers by address, so these live as long."""

    tap: RoutingTap
    routings: list[LayerRouting]


def _arguments(*, is_biased: bool) -> Arguments:
    """Of two layers, the first of whose experts is masked in the first row."""
    router = Router("sigmoid", has_bias=True) if is_biased else Router()
    layers = tuple(MoELayer(number, 8, 2, router) for number in range(2))
    topology, capacity = Topology("Tests", layers), Capacity(4, 1)
    tap, mask = RoutingTap(topology, capacity, CPU), ExpertMask(topology, capacity, CPU)
    mask.expert_bits_LEW[:, 0, 0] = mask.method_bits_MW[0, 0] = mask.row_bits_TW[0, 0] = 1
    routings = [make_routing(layer, index, tap, mask) for index, layer in enumerate(layers)]
    assert isinstance(routings[0], CpuLayerRouting)
    logits = torch.linspace(2.0, -2.0, NUM_ROWS * 8).view(NUM_ROWS, 8)
    topk_weights, topk_ids = torch.full((NUM_ROWS, 2), 0.5), torch.tensor([[0, 1]] * NUM_ROWS)
    bias = torch.tensor([0.0] * 7 + [9.0]) if is_biased else None
    arguments = Arguments([logits, topk_weights, topk_ids, routings[0]._facts, 1, bias])
    arguments.tap, arguments.routings = tap, routings
    return arguments


@pytest.mark.parametrize("is_biased", [False, True])
def test_it_does_what_the_operation_does(is_biased: bool) -> None:
    expected = _arguments(is_biased=is_biased)
    torch.ops.moe_guard.route_on_cpu(*expected)
    found = _arguments(is_biased=is_biased)
    assert build.extension() is not None, "Python's headers are there"
    assert shortest_way()(*found) is None
    for place in (1, 2):
        assert torch.equal(found[place], expected[place])
    assert found[2][0].tolist() == ([7, 1] if is_biased else [1, 2])
    assert torch.equal(found.tap.topk_ids_TLK, expected.tap.topk_ids_TLK)
    assert torch.equal(found.tap.topk_weights_TLK, expected.tap.topk_weights_TLK)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5])
def test_what_is_no_tensor_is_refused(place: int) -> None:
    arguments = _arguments(is_biased=True)
    arguments[place] = "nothing"
    with pytest.raises(TypeError, match="is no tensor"):
        shortest_way()(*arguments)


def test_another_number_of_arguments_is_refused() -> None:
    arguments = _arguments(is_biased=False)
    with pytest.raises(TypeError, match="takes 6 arguments, not 5"):
        shortest_way()(*arguments[:5])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda arguments: arguments.__setitem__(4, "first"), TypeError),
        (lambda arguments: arguments.__setitem__(4, 2), RuntimeError),
    ],
)
def test_a_layer_that_is_none_is_refused(
    change: Callable[[list[Any]], None], error: type[Exception]
) -> None:
    arguments = _arguments(is_biased=False)
    change(arguments)
    with pytest.raises(error):
        shortest_way()(*arguments)


def test_without_pythons_headers_it_is_the_operation(no_headers: None) -> None:
    _arguments(is_biased=False)
    assert shortest_way() is torch.ops.moe_guard.route_on_cpu.default


def _decided(position: int, engine: Engine) -> tuple[Any, ...]:
    report = engine.step({"a": (position, [FLAGGED if position % 3 else OTHER])})
    assert not report.failed
    return fired(report), report.requests_B.tolist(), report.masked_BW.tolist(), engine.masked_rows(1)


def test_what_python_cannot_load_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_EXTENSION", "moe_guard_other")  # the library has no such module
    build.extension.cache_clear()
    try:
        assert build.extension() is None
    finally:
        build.extension.cache_clear()
    assert "ctypes calls them" in caplog.text


def test_a_step_is_the_same_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []
    for compiled in (build.extension(), None):
        monkeypatch.setattr(interface, "extension", lambda compiled=compiled: compiled)
        engine = Engine(policy_text(rule_text(COUNT, MASK)))
        engine.guard.add_request("a", 1)
        engines.append(engine)
    for position in range(8):
        first, second = (_decided(position, engine) for engine in engines)
        assert first == second
    ways = [interface.step_functions()]
    monkeypatch.undo()
    ways.append(interface.step_functions())
    assert ways[0] != ways[1]


@pytest.mark.parametrize("name", ["begin_step", "end_step"])
def test_a_step_without_an_address_is_refused(name: str) -> None:
    compiled = build.extension()
    assert compiled is not None, "Python's headers are there"
    others = [1] * (3 if name == "begin_step" else 4)
    with pytest.raises(ValueError, match="there is no step"):
        getattr(compiled, name)(None, *others)
    with pytest.raises(TypeError, match=f"{name} takes {1 + len(others)} arguments, not 1"):
        getattr(compiled, name)(1)
    with pytest.raises(TypeError):
        getattr(compiled, name)("here", *others)
