"""How compiled graphs call a layer's routing on a CPU: as a function of Python.

What Inductor writes for an operation goes through torch's search for a kernel. Between two layers, when
nothing is warm, that takes several times as long as what the operation does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from guard.device.kernels.native.build import extension

_OPERATION = "torch.ops.moe_guard.route_on_cpu.default"
_NAME = "moe_guard_route"


def shortest_way() -> Callable[..., None]:
    """`moe_guard::route_on_cpu`, for graphs."""
    compiled = extension()
    way: Callable[..., None] = (
        torch.ops.moe_guard.route_on_cpu.default if compiled is None else compiled.route
    )
    return way


@cache
def let_graphs_call_it() -> None:
    """From now on. Where this torch has no place to say so, they call the operation as any other."""
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import (
            CUSTOM_EXTERN_KERNEL_CODEGEN,
            CustomCodegen,
        )
    except ImportError:
        return
    CUSTOM_EXTERN_KERNEL_CODEGEN[_OPERATION] = CustomCodegen(python=_write_call)


def _write_call(node: Any, write_line: Callable[[str], None]) -> None:
    from torch._inductor.virtualized import V

    V.graph.wrapper_code.add_import_once(f"from {__name__} import {shortest_way.__name__}")
    V.graph.wrapper_code.add_import_once(f"{_NAME} = {shortest_way.__name__}()")
    write_line(f"{_NAME}({', '.join([*node.codegen_args(), *node.codegen_kwargs()])})")
