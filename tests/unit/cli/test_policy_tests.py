"""`moe-guard test`: what it prints, and with what it exits."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from guard.cli import app
from tests.unit.testing.suites import HEADER, POLICY

CASES = """\
  - name: benign <output>
    output: [{tokens: 20}]
    expect: nothing
  - name: a burst
    output: [{tokens: 8}, {tokens: 8, use: flagged, selections: 4}]
    expect: [{rule: burst, at: output+13}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "burst.test.yaml").write_text(HEADER + CASES)
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["test", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_suites_that_pass_exit_with_0_and_say_what_is_not_covered(folder: Path) -> None:
    code, text, _ = run(folder)
    assert code == 0
    assert "2 cases, 0 failed" in text
    assert "1 of 2 rules fire in one case and stay silent in another" in text
    assert "burst/stop lacks a case in which it fires" in text
    code, _, _ = run(folder, "--require-coverage")
    assert code == 1


@pytest.mark.parametrize("path", ["policy.yaml", "burst.test.yaml"])
def test_a_policy_or_a_suite_may_be_named(folder: Path, path: str) -> None:
    code, text, _ = run(folder / path)
    assert (code, "2 cases, 0 failed" in text) == (0, True)


def test_a_failure_exits_with_1_and_has_its_place(folder: Path) -> None:
    suite = folder / "burst.test.yaml"
    suite.write_text(HEADER + CASES.replace("output+13", "output+12"))
    code, text, _ = run(suite)
    assert code == 1
    assert f"{suite}:10:14: expected burst/burst to fire at 13; it fired at 14" in text


def test_junit_has_a_testcase_for_each_case(folder: Path) -> None:
    suite = folder / "burst.test.yaml"
    suite.write_text(HEADER + CASES.replace("output+13", "output+12"))
    code, text, _ = run(folder, "--format", "junit")
    root = ElementTree.fromstring(text)
    assert code == 1
    assert (root.get("tests"), root.get("failures")) == ("2", "1")
    cases = root.findall(".//testcase")
    assert [case.get("name") for case in cases] == ["benign <output>", "a burst"]
    failure = cases[1].find("failure")
    assert failure is not None
    assert "expected burst/burst to fire at 13" in str(failure.get("message"))
    assert cases[0].find("failure") is None


def test_json_has_cases_and_coverage(folder: Path) -> None:
    _, text, _ = run(folder, "--format", "json")
    found = json.loads(text)
    assert (found["passed"], found["failed"]) == (2, 0)
    (suite,) = found["suites"]
    assert suite["cases"][1]["decisions"] == [{"rule": "burst/burst", "position": 14}]
    assert [(one["rule"], one["fires"], one["silent"]) for one in found["coverage"]] == [
        ("burst/burst", 1, 1),
        ("burst/stop", 0, 2),
    ]


def test_a_filter_leaves_cases_out(folder: Path) -> None:
    _, text, _ = run(folder, "--format", "json", "--filter", "benign")
    (suite,) = json.loads(text)["suites"]
    assert [case["name"] for case in suite["cases"]] == ["benign <output>"]


def test_where_there_is_no_suite_it_says_how_to_write_one(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    code, _, error = run(tmp_path)
    assert code == 1
    assert "write a file of kind: PolicyTest beside the policies" in error


def test_faults_of_suites_and_policies_are_told_together(folder: Path) -> None:
    (folder / "burst.test.yaml").write_text(HEADER + CASES.replace("expect", "expects"))
    (folder / "sub").mkdir()
    (folder / "sub" / "policy.yaml").write_text("kind: Policy\n")
    code, _, error = run(folder)
    assert code == 1
    assert "unknown key 'expects'; did you mean 'expect'?" in error
    assert f"{folder}/sub/policy.yaml:1:1: the key 'apiVersion' is missing" in error
