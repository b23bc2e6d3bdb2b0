"""Kernels that route inside themselves, where the guard sees no choice: vLLM is asked for others.

For each quantisation vLLM has an oracle, which walks through back ends, and through the kernels of
each, and takes the first that says that it supports the server. While a guarded model is built,
kernels that route inside say that they do not. Where a back end has a modular kernel as well, or
another back end has one, vLLM takes that; where none is left, vLLM refuses to start and gives the
reason. Another kernel may round differently: the tokens of a guarded server are those of an unguarded
one with the same kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from guard_vllm.compat import seam

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

REASON = (
    "it routes inside the kernel, where MoE Guard cannot see it (choose another --moe-backend, such as "
    "triton or marlin, or serve without MoE Guard's policies)"
)


@contextmanager
def modular_kernels_only() -> Iterator[None]:
    """While it holds, vLLM's oracles pass over every kernel that routes inside itself.

    Raises UnsupportedHostError where this vLLM has no such oracle.
    """
    passed_over: dict[type, Any] = {}  # and what each had of its own under the name
    stocks = [(module, name, seam(module, name)) for module, name in _KERNELS_OF.items()]
    for module, name, stock in stocks:
        setattr(import_module(module), name, _passing_over(stock, passed_over))
    try:
        yield
    finally:
        for module, name, stock in stocks:
            setattr(import_module(module), name, stock)
        for kernel, own in passed_over.items():
            if own is None:
                del kernel.is_supported_config  # type: ignore[attr-defined]
            else:
                kernel.is_supported_config = own  # type: ignore[attr-defined]
    if passed_over:
        names = ", ".join(sorted(kernel.__name__ for kernel in passed_over))
        logger.info("MoE Guard had vLLM pass over kernels that route inside themselves: %s", names)


def _passing_over(stock: Any, passed_over: dict[type, Any]) -> Any:
    def kernels_of(*args: Any, **kwargs: Any) -> Any:
        kernels = stock(*args, **kwargs)
        for kernel in kernels:
            if kernel.is_monolithic() and kernel not in passed_over:
                passed_over[kernel] = kernel.__dict__.get("is_supported_config")
                kernel.is_supported_config = staticmethod(_is_not_supported)
        return kernels

    return kernels_of


def _is_not_supported(*args: Any, **kwargs: Any) -> tuple[bool, str]:
    return False, REASON
