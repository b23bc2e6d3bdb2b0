"""`moe-guard log key` and `log verify`: what they say, and how they exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard.cli import app
from tests.unit.events.log.chains import lines_of, make_key, older_first, open_log, record


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["log", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def verified(*arguments: object) -> tuple[int, Any]:
    code, out, err = run("verify", *arguments, "--format", "json")
    assert err == ""
    return code, json.loads(out)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of 20 lines in several files."""
    path = tmp_path / "decisions.jsonl"
    writer = open_log(path, max_bytes=1500)
    for number in range(20):
        writer.append(record(number))
    writer.close()
    return path


def test_a_good_log_is_read_with_its_rotated_files_and_its_head_is_printed(log: Path) -> None:
    code, out, _ = run("verify", log)

    assert code == 0
    summary, head = out.splitlines()
    assert summary == "20 good lines, n=1 to n=20; 0 faults"
    assert head == f"head: 20:{json.loads(log.read_text().splitlines()[-1])['chain']['hash']}"
    assert len(older_first(log)) > 2


def test_faults_are_printed_one_a_line_with_file_and_line(log: Path) -> None:
    rotated = log.with_name(f"{log.name}.1")
    rotated.write_bytes(rotated.read_bytes().replace(b'"text":""', b'"text":"x"', 1))
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines, record(3)]))
    code, out, _ = run("verify", log)

    assert code == 1
    assert out.splitlines()[:2] == [
        f"{rotated}:1: was changed: its hash is of other bytes",
        f"{log}:{len(lines) + 1}: has no place in the chain: written without, or put in",
    ]
    assert "19 good lines, n=1 to n=20; 2 faults" in out


def test_several_files_are_read_as_they_are_given(log: Path) -> None:
    files = older_first(log)

    assert verified(*files)[0] == 0
    assert verified(*files[::-1])[0] == 1
    code, document = verified(files[0], files[2])
    assert code == 1
    assert [one["code"] for one in document["findings"]] == ["missing"]


def test_a_head_that_was_kept_shows_an_end_that_was_cut_off(log: Path) -> None:
    head = verified(log)[1]["head"]
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))

    assert verified(log)[0] == 0, "nothing in the log itself shows it"
    code, document = verified(log, "--head", head)
    assert code == 1
    assert [one["code"] for one in document["findings"]] == ["head"]
    assert "ends with n=19, but n=20 was written" in document["findings"][0]["message"]


def test_json_says_all_that_text_says(log: Path) -> None:
    code, document = verified(log)

    assert code == 0
    last = json.loads(log.read_text().splitlines()[-1])["chain"]
    assert document == {
        "ok": True,
        "good_lines": 20,
        "faults": 0,
        "notices": 0,
        "first_n": 1,
        "last_n": 20,
        "log": last["log"],
        "head": f"20:{last['hash']}",
        "findings": [],
    }
    log.write_bytes(log.read_bytes()[:-9])
    document = verified(log)[1]
    assert document["ok"] is True
    [finding] = document["findings"]
    assert finding["file"] == str(log)
    assert (finding["severity"], finding["code"]) == ("notice", "torn")


def test_a_key_is_made_and_a_sealed_log_is_verified_with_its_other_file(tmp_path: Path) -> None:
    key, elsewhere = tmp_path / "key", tmp_path / "elsewhere"
    code, out, _ = run("key", key)
    assert code == 0
    assert f"{key}.verify: for `moe-guard log verify --key`; take it off the server now" in out
    (tmp_path / "key.verify").rename(elsewhere)
    writer = open_log(tmp_path / "log", key)
    for number in range(5):
        writer.append(record(number))
    writer.close()

    assert verified(tmp_path / "log", "--key", elsewhere)[1]["good_lines"] == 5
    code, document = verified(tmp_path / "log")
    assert code == 0
    assert [one["code"] for one in document["findings"]] == ["sealed"]
    (tmp_path / "forged").write_bytes(b"".join(lines_of(5)))
    code, document = verified(tmp_path / "forged", "--key", elsewhere)
    assert (code, document["good_lines"], document["faults"]) == (1, 0, 1)
    code, _, err = run("verify", tmp_path / "log", "--key", key)
    assert code == 2
    assert "is the server's key, which is at n=5" in err
    code, _, err = run("key", key)
    assert code == 1
    assert "is there already" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere cannot be read: No such file"),
        (["."], "cannot be read: Is a directory"),
        (["log", "--head", "20"], "write N:HASH"),
        (["log", "--head", f"0:{'0' * 64}"], "write N:HASH"),
        (["log", "--key", "open"], "others may use the log's key"),
        (["log", "--key", "nowhere"], "cannot be read: No such file"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_bytes(b"".join(lines_of(2)))
    make_key(tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    code, out, err = run("verify", *arguments)

    assert code == 2
    assert said in err
    assert out == ""
