"""`moe-guard import`: sets are added to a profile, or nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app

TABLE = Path(__file__).parents[1] / "discover" / "data" / "steermoe_like.pkl"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr.replace("\n", " ")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    content = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": "Qwen3MoeForCausalLM"},
        "sets": {"own": [{"layer": 0, "experts": [1]}]},
    }
    path.write_text(json.dumps(content))
    return path


def test_sets_are_added_with_where_they_come_from(profile: Path) -> None:
    code, said = run(TABLE, "--format", "steermoe", "--profile", profile)
    assert code == 0, said
    written = json.loads(profile.read_text())
    assert written["sets"] == {
        "own": [{"layer": 0, "experts": [1]}],
        "steermoe-raised": [{"layer": 12, "experts": [85]}],
        "steermoe-lowered": [{"layer": 12, "experts": [4]}],
    }
    [imported] = written["provenance"]["imported"]
    assert imported["file"] == TABLE.name
    assert imported["sets"] == ["steermoe-lowered", "steermoe-raised"]
    assert len(imported["sha256"]) == 64


def test_the_profile_can_be_left_as_it_is(profile: Path, tmp_path: Path) -> None:
    before = profile.read_text()
    code, _ = run(TABLE, "--format", "steermoe", "--profile", profile, "--out", tmp_path / "new.json")
    assert code == 0
    assert profile.read_text() == before
    assert "steermoe-raised" in json.loads((tmp_path / "new.json").read_text())["sets"]


def test_a_set_that_is_there_is_not_written_over(profile: Path) -> None:
    run(TABLE, "--format", "steermoe", "--profile", profile)
    before = profile.read_text()
    code, said = run(TABLE, "--format", "steermoe", "--profile", profile)
    assert code == 1
    assert "has a set 'steermoe-raised' already; give another --prefix" in said
    assert profile.read_text() == before


def test_what_would_be_no_profile_is_not_written(profile: Path) -> None:
    profile.write_text("{}")
    code, said = run(TABLE, "--format", "steermoe", "--profile", profile)
    assert code == 1
    assert "apiVersion" in said
    assert profile.read_text() == "{}"
