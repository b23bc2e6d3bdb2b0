"""vLLM's own oracle, on kernels that route inside themselves: it is asked for others, and refuses
where there are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.monolithic import REASON, modular_kernels_only
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.oracle import mxfp4


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
    with modular_kernels_only():
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


def test_without_one_the_back_end_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="MoE Guard cannot see it") as caught:
        choose(monkeypatch, RoutesInside)
    assert REASON in str(caught.value)


def test_behind_the_build_everything_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = mxfp4.backend_to_kernel_cls
    choose(monkeypatch, RoutesInside, RoutesInsideAndDecidesItself, Kernel)
    monkeypatch.undo()
    assert mxfp4.backend_to_kernel_cls is stock
    assert RoutesInside.is_supported_config() == (True, None)
    assert "is_supported_config" not in RoutesInside.__dict__
    assert RoutesInsideAndDecidesItself.is_supported_config() == (True, "its own word")
