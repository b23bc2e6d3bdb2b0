"""The judge's Triton kernels decide as their twin does, and compile for the GPUs that they are for.

Both in processes of their own: whether Triton interprets is settled when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("triton")

_ROOT: Final = Path(__file__).parents[4]
_SLOW: Final = (  # steps of thousands of rows, which an interpreter goes through one by one
    "more_firings",
    "not_crowded_out",
    "exactly_as_many",
    "change_hands",
    "firings_of_a_cached_prefix",
    "than_slots_make_room",
)


def _run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=_ROOT,
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_decide_and_leave_what_their_twin_does() -> None:
    done = _run(
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
    done = _run("tests.support.compiled_kernels", "90")
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert {name for name, _ in map(str.split, used)} == {"decide", "reduce", "begin", "admit"}
    assert all(resources["LOCAL"] == 0 and resources["STACK"] <= 64 for resources in used.values()), (
        used
    )
