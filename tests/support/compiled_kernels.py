"""`python -m tests.support.compiled_kernels 80 90`: compiles the kernels for these NVIDIA
architectures, without a GPU, and prints the registers and memory that each takes, as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from guard.device.kernels.triton_judge.admit import admit_kernel
from guard.device.kernels.triton_judge.begin import begin_kernel
from guard.device.kernels.triton_judge.decide import decide_kernel
from guard.device.kernels.triton_judge.reduce import reduce_kernel
from guard.device.kernels.triton_route.kernel import route_kernel

_TYPES = {
    **dict.fromkeys(("real", "extreme_SC", "values_V"), "*fp64"),
    **dict.fromkeys(("active_SR", "applies_SR", "enforced_SR", "exempt_SR", "trusted_T"), "*i1"),
    **dict.fromkeys(("extremes_BC", "topk_weights_TLK"), "*fp32"),
    **dict.fromkeys(("topk_ids_TLK", "experts_L", "table", "written_K", "rejected_B"), "*i32"),
    "narrow_KX": "*i16",
    **dict.fromkeys(("evidence", "whole", "scratch", "counters", "num_events"), "*i64"),
}
_ROUTE_TYPES = {
    **dict.fromkeys(("topk_weights", "tap_weights_TK", "bias"), "*fp32"),
    "router_logits": "*bf16",
    "topk_ids": "*i32",
    "tap_ids_TK": "*i32",
    "scaling": "fp32",
}
_ROUTE_SIZES: dict[str, int | bool] = {
    **{"TOP_K": 8, "BLOCK_K": 8, "NUM_EXPERTS": 256, "BLOCK_E": 256, "IS_MASKING": True},
    **{"NUM_GROUPS": 8, "TOPK_GROUPS": 4, "BLOCK_G": 8, "SCORING": 1, "RENORMALIZE": True},
    "HAS_BIAS": True,
}
_KERNELS: dict[str, tuple[Any, dict[str, int | bool]]] = {
    "decide": (
        decide_kernel,
        {"HAS_REJECTED": True, "HAS_COMPUTED": True, "BLOCK": 128, "PACK_BLOCK": 1024},
    ),
    "reduce": (reduce_kernel, {"TOP_K": 8, "KEEPS": True, "HAS_REJECTED": True, "BLOCK": 128}),
    "begin": (begin_kernel, {"ROWS": 16, "FILL": 512}),
    "admit": (admit_kernel, {"BLOCK": 128}),
    "route": (route_kernel, _ROUTE_SIZES),
}


def _resources(kernel: Any, constants: dict[str, int | bool], capability: int) -> dict[str, int]:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        types = _ROUTE_TYPES if kernel is route_kernel else _TYPES
        return types.get(name) or ("*i64" if name[-1].isupper() or name[-1] == "1" else "i32")

    assert all(p.is_constexpr or p.do_not_specialize for p in kernel.params), "sizes are compiled in"
    compiled = triton.compile(
        ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
    numbers = [part.split(":") for part in said.splitlines()[-1].split()]
    return {name: int(number) for name, number in numbers if "[" not in name}


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps(
            {
                f"{name} sm_{capability}": _resources(*kernel, int(capability))
                for name, kernel in _KERNELS.items()
                for capability in sys.argv[1:]
            },
            indent=1,
        )
    )
