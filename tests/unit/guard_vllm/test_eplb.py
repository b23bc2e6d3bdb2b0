"""Expert load balancing moves experts under a running server: what the guard sees stays logical."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.eplb_remap import MAPS, MASKED
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def routed() -> dict[str, Any]:
    """By map: physical ids, weights, and the ids that the tap holds."""
    support = CHECKOUT / "tests" / "support"
    paths = [support / "v2_on_cpu", CHECKOUT, CHECKOUT / "integrations" / "vllm"]
    done = subprocess.run(
        [sys.executable, str(support / "eplb_remap.py")],
        env={
            **os.environ,
            "MOE_GUARD_TEST_V2": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_copies_of_experts_are_no_experts_of_the_model(routed: dict[str, Any]) -> None:
    assert routed["num_experts"] == [8, 8]


def test_a_remap_changes_places_and_neither_logical_ids_nor_weights(routed: dict[str, Any]) -> None:
    first = routed["in order"]
    assert first["physical"] == first["tapped"]
    for name in ("reversed", "copies"):
        assert routed[name]["physical"] != first["physical"], "nothing was mapped"
        assert routed[name]["tapped"] == first["tapped"]
        assert routed[name]["weights"] == first["weights"]


@pytest.mark.parametrize("name", MAPS)
def test_masked_rows_use_no_copy_of_a_masked_expert_wherever_it_lies(
    routed: dict[str, Any], name: str, support_record: SupportRecord
) -> None:
    used = [set(row) & set(MAPS[name][MASKED]) for row in routed[name]["physical"]]
    assert not any(used[0::2])
    assert all(used[1::2])
    support_record.feature("expert load balancing (EPLB)", runner="router")
