"""`moe-guard record`: what it refuses before vLLM is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from guard.cli import app
from guard.cli.record import read_prompts


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["record", "some-model", *map(str, arguments)])
    return result.exit_code, result.stderr.replace("\n", " ")


def test_other_fields_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "topic": "x", "n": 3}\n\n{"messages": [{"role": "user"}]}\n')
    assert read_prompts(path) == [
        {"prompt": "a", "labels": {"topic": "x", "n": "3"}},
        {"messages": [{"role": "user"}], "labels": {}},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:1:2: not JSON"),
        ("[]", "prompts.jsonl:1: a JSON object with either `prompt` or `messages`"),
        ('{"prompt": "a", "messages": []}', "with either `prompt` or `messages`"),
        ('{"prompt": 3}', "`prompt` is a text, `messages` a list"),
        ("", "holds no prompt"),
    ],
    ids=["json", "list", "both", "number", "empty"],
)
def test_prompts_that_cannot_be_read_are_refused_with_their_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    code, error = run("--prompts", path, "--out", tmp_path / "a.moetrace")
    assert code == 1
    assert message in error


def test_a_trace_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.moetrace").write_text("")
    code, error = run("--prompts", tmp_path / "p", "--out", tmp_path / "a.moetrace")
    assert code == 1
    assert "is there already; name another file" in error
