"""The judge's Triton kernels decide as their twin does, and compile for the GPUs that they are for.

Both in processes of their own: whether Triton interprets is settled when it is imported.
"""

from __future__ import annotations

import json
from typing import Final

import pytest

from tests.support.interpreted import run_module

pytest.importorskip("triton")

_SLOW: Final = (  # steps of thousands of rows, which an interpreter goes through one by one
    "more_firings",
    "not_crowded_out",
    "exactly_as_many",
    "change_hands",
    "firings_of_a_cached_prefix",
    "than_slots_make_room",
)


def test_kernels_decide_and_leave_what_their_twin_does() -> None:
    done = run_module(
        "pytest",
        "-q",
        "-p",
        "tests.support.judged_by_kernels",
        "-p",
        "no:cacheprovider",
        "-k",
        " and ".join(f"not {name}" for name in _SLOW),
        "tests/unit/device/test_runtime.py",
        "tests/unit/device/test_kept_evidence.py",
        "tests/unit/device/kernels/judge_conformance.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_kernels_compile_for_gpus_and_keep_their_numbers_in_registers() -> None:
    done = run_module("tests.support.compiled_kernels", "90")
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert {name for name, _ in map(str.split, used)} == {
        *("decide", "reduce", "begin", "admit", "route")
    }
    assert all(resources["LOCAL"] == 0 and resources["STACK"] <= 64 for resources in used.values()), (
        used
    )
