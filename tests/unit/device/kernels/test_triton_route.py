"""The GPU's kernel for mask and tap passes what the CPU's does, under Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.support.interpreted import run_module

pytest.importorskip("triton")


def test_the_kernel_of_a_gpu_routes_as_that_of_a_cpu_does() -> None:
    done = run_module(
        *("pytest", "-q", "-p", "no:cacheprovider", "tests/unit/device/kernels/test_layer_routing.py"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
