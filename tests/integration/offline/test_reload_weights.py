"""Weights that are loaded again are proved again: new gates may route otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.offline import policies
from tests.integration.offline.engines import Engines
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def answers(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reload")
    result = folder / "result.json"
    script = Path(__file__).parents[2] / "support" / "reload_run.py"
    watched = [one for one in policies.MAIN if one["metadata"]["name"] in ("isolate", "watch")]
    arguments = [engines.folder / "moe", policies.write(folder / "policies", watched), result]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=engines._environment("reload"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_weights_under_which_the_proof_holds_change_nothing(
    answers: dict[str, Any], support_record: SupportRecord
) -> None:
    support_record.feature("weights reloaded while serving", runner="v1")
    assert answers["before"]["decisions"]
    assert not answers["before"]["blind"]
    assert answers["reloaded"] == answers["before"]


def test_weights_under_which_it_does_not_hold_leave_the_guard_blind(answers: dict[str, Any]) -> None:
    assert answers["unproved"]["blind"]
    assert answers["unproved"]["decisions"] == [], "nothing is judged"


def test_a_proof_that_holds_again_ends_the_blindness(answers: dict[str, Any]) -> None:
    assert answers["proved again"] == answers["before"]
