"""Which kernel a guarded model gets: one that leaves routing to its router, wherever vLLM has one.

For each quantisation vLLM has an oracle, which walks through back ends, and through the kernels of
each, and takes the first that says that it supports the layer. While a guarded model is built, kernels
that route inside themselves say that they do not. Where another kernel supports the layer, vLLM takes
that. It may round differently: the tokens of a guarded server are those of an unguarded one with the
same kernel.

Where vLLM finds none, it is asked again with the kernels that route inside, and their masks go through
the logits, if that is enough for the layer (`logit_masks`). If not, there is no server, and the error
says what of the layer stands in the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from guard.errors import UnsupportedHostError
from guard_vllm.compat import seam
from guard_vllm.logit_masks import why_not_enough

logger = logging.getLogger(__name__)

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle"
_KERNELS_OF = {
    **{
        f"{_ORACLE}.{name}": "backend_to_kernel_cls"
        for name in (
            *("unquantized", "fp8", "int8", "int_wna16"),
            *("mxfp4", "nvfp4", "w4a8", "w4a8_int8"),
        )
    },
    f"{_ORACLE}.mxfp8": "_mxfp8_backend_to_kernel_cls",
}
"""Oracle modules, and what in each lists the kernels of a back end."""

_ROUTED_EXPERTS = ("vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts")

REASON = "it routes inside the kernel, where MoE Guard cannot see it"
_REMEDY = (
    "choose another --moe-backend, such as triton or marlin, or serve without MoE Guard's policies"
)


@contextmanager
def guardable_kernels() -> Iterator[dict[str, type]]:
    """While it holds, vLLM takes a kernel that routes inside itself only where it has no other, and
    where that one can be masked through its logits.

    Gives the kernels that were taken so, by layer name, filled as layers are built. Raises
    UnsupportedHostError where this vLLM has no such oracle; a layer that cannot be guarded raises it
    out of vLLM's own code.
    """
    hidden, taken = _Hidden(), dict[str, type]()
    experts_cls = seam(*_ROUTED_EXPERTS)
    get_quant_method = seam(experts_cls, "_get_quant_method")
    stocks = [(module, name, seam(module, name)) for module, name in _KERNELS_OF.items()]
    for module, name, stock in stocks:
        setattr(import_module(module), name, hidden.hiding(stock))
    experts_cls._get_quant_method = _choosing(get_quant_method, hidden, taken)
    try:
        yield taken
    finally:
        experts_cls._get_quant_method = get_quant_method
        for module, name, stock in stocks:
            setattr(import_module(module), name, stock)
        hidden.show()
    if names := hidden.names - {kernel.__name__ for kernel in taken.values()}:
        logger.info(
            "MoE Guard had vLLM pass over kernels that route inside themselves: %s",
            ", ".join(sorted(names)),
        )
    if taken:
        logger.warning(
            "vLLM has no kernel for %d MoE layers but %s, which routes inside itself: MoE Guard masks "
            "it through its router's logits and routes again to see what they mean",
            len(taken),
            ", ".join(sorted({kernel.__name__ for kernel in taken.values()})),
        )


class _Hidden:
    """Kernels that route inside themselves, and that say that they support nothing until `show`."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._own: dict[type, Any] = {}  # what each had of its own under the name
        self._is_hiding = True

    def hiding(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def kernels_of(*args: Any, **kwargs: Any) -> Any:
            kernels = stock(*args, **kwargs)
            for kernel in kernels:
                if self._is_hiding and kernel.is_monolithic():
                    self._hide(kernel)
            return kernels

        return kernels_of

    def _hide(self, kernel: Any) -> None:
        self.names.add(kernel.__name__)
        if kernel not in self._own:
            self._own[kernel] = kernel.__dict__.get("is_supported_config")
            kernel.is_supported_config = staticmethod(_is_not_supported)

    def show(self) -> None:
        for kernel, own in self._own.items():
            if own is None:
                del kernel.is_supported_config  # type: ignore[attr-defined]
            else:
                kernel.is_supported_config = own  # type: ignore[attr-defined]
        self._own.clear()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """For as long as it holds; an oracle hides them again when it next asks for kernels."""
        self.show()
        self._is_hiding = False
        try:
            yield
        finally:
            self._is_hiding = True


def _is_not_supported(*args: Any, **kwargs: Any) -> tuple[bool, str]:
    return False, f"{REASON} ({_REMEDY})"


def _choosing(stock: Callable[..., Any], hidden: _Hidden, taken: dict[str, type]) -> Callable[..., Any]:
    def get_quant_method(experts: Any, *args: Any, **kwargs: Any) -> Any:
        before, hidden.names = hidden.names, set()
        try:
            return stock(experts, *args, **kwargs)
        except (ValueError, NotImplementedError) as error:  # what oracles raise that found no kernel
            if not hidden.names:
                raise
            with hidden.shown():
                method = stock(experts, *args, **kwargs)
            if not method.is_monolithic:
                return method
            kernel = getattr(method, "experts_cls", type(method))
            if why := why_not_enough(experts):
                raise UnsupportedHostError(
                    f"vLLM has no kernel for layer {experts.layer_name} but {kernel.__name__}: "
                    f"{REASON}. Masks through the router's logits are not enough there, for {why}; "
                    f"{_REMEDY}"
                ) from error
            taken[experts.layer_name] = kernel
            return method
        finally:
            hidden.names |= before

    return get_quant_method
