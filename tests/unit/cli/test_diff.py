"""`moe-guard diff`: its three forms, and with what it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app

OLD = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  mode: audit\n"
    "  experts: {f: [{layer: 1, experts: [3]}]}\n"
    "  rules:\n    - {name: r, when: {mass: {experts: f, above: 0.5}}, then: {block: {message: a_b}}}\n"
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old.yaml").write_text(OLD)
    return tmp_path / "old.yaml"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    text = OLD.replace("audit", "enforce").replace("0.5", "0.6").replace("a_b", "c_d")
    (tmp_path / "new.yaml").write_text(text)
    return tmp_path / "new.yaml"


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["diff", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_changes_are_grouped_by_side(old: Path, new: Path) -> None:
    code, out, err = run(old, new)

    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.startswith("revision ")
    assert lines == [
        "stricter:",
        "  p: mode: audit → enforce: r blocks",
        "looser:",
        "  p/r: `mass` threshold: above 0.5 → above 0.6, looser",
        "other:",
        "  p/r: block message: 'a_b' → 'c_d'",
    ]


def test_equal_content_is_said_to_be_equal_wherever_it_lies(old: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "moved.yaml").write_text("# moved\n" + OLD)

    code, out, _ = run(old, tmp_path / "sub", "--exit-code")

    assert code == 0
    assert out.startswith("no change in effect (revision ")


def test_exit_code_tells_that_something_changes(old: Path, new: Path) -> None:
    assert run(old, new, "--exit-code")[0] == 1
    assert run(old, old, "--exit-code")[0] == 0


def test_json_names_both_revisions_and_each_change(old: Path, new: Path) -> None:
    told = json.loads(run(old, new, "--format", "json")[1])

    assert set(told) == {"old", "new", "changes"}
    assert told["old"] != told["new"]
    assert told["changes"][0] == {
        "effect": "stricter",
        "policy": "p",
        "name": "",
        "what": "mode",
        "message": "mode: audit → enforce: r blocks",
    }


def test_markdown_is_for_pull_requests(old: Path, new: Path) -> None:
    lines = run(old, new, "--format", "markdown")[1].splitlines()

    assert lines[0].startswith("**Policies**: revision `")
    assert "### Stricter" in lines
    assert "- `p/r`: block message: 'a\\_b' → 'c\\_d'" in lines


def test_a_set_that_cannot_be_used_is_told_on_standard_error(old: Path, tmp_path: Path) -> None:
    code, out, err = run(old, tmp_path / "missing")

    assert (code, out) == (2, "")
    assert "there is no such file or folder" in err
