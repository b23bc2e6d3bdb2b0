"""The support table says what tests showed, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.support_docs import differing, render
from tests.support.support_facts import (
    METHODS,
    as_json,
    facts_of,
    feature_fact,
    from_json,
    verdicts,
)
from tests.support.support_recorder import SupportRecorder


def _statuses(*facts: Any) -> list[str]:
    return [verdict.status for verdict in verdicts([one for some in facts for one in some]).values()]


def test_a_cell_works_only_where_every_test_that_speaks_of_it_passed() -> None:
    passed = facts_of("a.py::t", True, "Mixtral", ["drop"])
    failed = facts_of("b.py::t", False, "Mixtral", ["drop"])
    refused = facts_of("c.py::t", True, "Mixtral", ["drop"], refused="why")
    assert _statuses(passed, passed) == ["works"]
    assert _statuses(passed, failed) == ["fails"]
    assert _statuses(refused) == ["refused"]
    assert _statuses(passed, refused) == ["fails"]


@pytest.mark.parametrize(
    "words", [{"runner": "v3"}, {"mode": "graph"}, {"refused": "a", "untestable": "b"}]
)
def test_an_unknown_word_is_refused(words: Any) -> None:
    with pytest.raises(ValueError, match=r"support table|not both"):
        facts_of("t", True, "Mixtral", ["drop"], **words)
    with pytest.raises(ValueError, match="reroute"):
        facts_of("t", True, "Mixtral", ["droop"])  # type: ignore[list-item]


def test_facts_survive_the_file() -> None:
    facts = facts_of("a.py::t[x]", True, "Mixtral", METHODS, runner="v2", refused="why")
    facts.append(feature_fact("a.py::t", False, "n > 1", runner="v1"))
    assert from_json(json.loads(json.dumps(as_json(facts)))) == facts


def test_families_with_equal_cells_share_a_line_and_reasons_a_note() -> None:
    facts = [
        *facts_of("a.py::t", True, "Mixtral", METHODS),
        *facts_of("a.py::t", True, "OLMoE", METHODS),
        *facts_of("a.py::t", True, "Jamba", ["observe"]),
        *facts_of("a.py::t", True, "Jamba", ["force"], refused="it | cannot"),
        *facts_of("a.py::t", True, "Mixtral", ["reroute"], parallelism="TP=2"),
    ]
    page = render(facts)["support.md"]
    assert "| Mixtral, OLMoE | all |\n" in page
    assert "| Jamba | observe; refused: force [1] |\n" in page
    assert "\n1. it | cannot\n" in page
    assert "| TP=2 | V1 eager | Mixtral | reroute |\n" in page


def test_features_and_hosts_have_a_line_each_whether_tested_or_not() -> None:
    facts = [
        feature_fact("a.py::t", True, "chunked prefill", runner="v1"),
        feature_fact("a.py::t", False, "prefix caching", runner="v2"),
        feature_fact("a.py::t", True, "beam search", refused="a 400"),
        feature_fact("a.py::t", True, "LoRA adapters", refused="not yet"),
        feature_fact("a.py::t", True, "pipeline parallelism", runner="v1", refused="needs V2"),
        *facts_of("b.py::t", True, "Mixtral", ["drop"], runner="v2", parallelism="PP=2"),
        *facts_of("b.py::t", True, "Mixtral", ["drop"], parallelism="TP=2"),
        *facts_of("b.py::t", False, "OLMoE", ["drop"], parallelism="TP=2"),
    ]
    pages = render(facts)
    page = pages["support.md"]
    assert "| feature | V1 eager | V2 eager |\n" in page
    assert "| chunked prefill | works |  |\n" in page
    assert "| prefix caching |  | fails [" in page
    assert "| n > 1 | not tested | not tested |\n" in page
    note = next(line for line in page.splitlines() if line.endswith(" a 400"))
    refused = f"refused [{note.partition('.')[0]}]"
    assert f"| beam search | {refused} | {refused} |\n" in page
    assert "| LoRA adapters | refused | not yet |\n" in page
    assert "| sleep mode | not tested |  |\n" in page
    assert "| pipeline parallelism, V2 eager | works |  |\n" in page
    assert "| pipeline parallelism, V1 eager | refused | needs V2 |\n" in page
    assert "| tensor parallelism, V1 eager | fails | b.py::t failed |\n" in page
    rows = json.loads(pages["support.json"])
    assert [row["status"] for row in rows if row.get("name") == "LoRA adapters"] == ["refused"]


@pytest.mark.parametrize(
    ("name", "words"), [("telepathy", {}), ("n > 1", {"runner": "v3"}), ("n > 1", {"mode": "graph"})]
)
def test_an_unknown_feature_or_place_is_refused(name: str, words: Any) -> None:
    with pytest.raises(ValueError, match="the support table has"):
        feature_fact("t", True, name, **words)


def test_docs_that_another_run_wrote_are_named(tmp_path: Path) -> None:
    facts = facts_of("a.py::t", True, "Mixtral", ["drop"])
    assert differing(facts, tmp_path) == ["support.json", "support.md"]
    for name, text in render(facts).items():
        (tmp_path / name).write_text(text)
    assert differing(facts, tmp_path) == []
    assert differing(facts_of("a.py::t", False, "Mixtral", ["drop"]), tmp_path) == [
        "support.json",
        "support.md",
    ]


_TESTS = """
import pytest

@pytest.mark.parametrize("method", ["drop", "force"])
def test_cell(support_record, method):
    support_record("Mixtral", method)
    if method == "drop":
        support_record.feature("n > 1", runner="v2")
    assert method != "{failing}"
"""

_CONFTEST = """
import pathlib, pytest
from tests.support.support_recorder import SupportRecorder
recorder = SupportRecorder(pathlib.Path("facts/facts.json"), pathlib.Path("docs"))

def pytest_configure(config):
    config.pluginmanager.register(recorder)

@pytest.fixture
def support_record(request):
    return recorder.record(request.node.nodeid)
"""


def _suite(pytester: pytest.Pytester, failing: str = "") -> None:
    pytester.makeini("[pytest]\ntestpaths = inner\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest(_CONFTEST)
    inner = pytester.path / "inner"
    inner.mkdir(exist_ok=True)
    (inner / "test_cells.py").write_text(_TESTS.format(failing=failing))


def _facts(pytester: pytest.Pytester) -> tuple[bool, dict[str, bool]]:
    stored = json.loads((pytester.path / "facts" / "facts.json").read_text())
    return stored["whole"], {
        f["cell"]["method"]: f["passed"] for f in stored["facts"] if "method" in f["cell"]
    }


def test_a_whole_run_fails_until_the_docs_say_what_it_showed(pytester: pytest.Pytester) -> None:
    _suite(pytester)
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["*docs/support.json and docs/support.md are not what*"])
    assert result.ret == 1
    whole, facts = _facts(pytester)
    assert (whole, facts) == (True, {"drop": True, "force": True})
    stored = json.loads((pytester.path / "facts" / "facts.json").read_text())
    docs = pytester.mkdir("docs")
    for name, text in render(from_json(stored["facts"])).items():
        (docs / name).write_text(text)
    assert pytester.runpytest_inprocess().ret == 0
    (docs / "support.md").write_text("by hand")
    assert pytester.runpytest_inprocess().ret == 1


def test_a_partial_run_adds_its_facts_and_judges_no_docs(pytester: pytest.Pytester) -> None:
    _suite(pytester)
    assert pytester.runpytest_inprocess("-k", "drop").ret == 0
    assert _facts(pytester) == (False, {"drop": True})
    assert pytester.runpytest_inprocess("inner/test_cells.py").ret == 0
    assert _facts(pytester) == (False, {"drop": True, "force": True})
    pytester.runpytest_inprocess()
    _suite(pytester, failing="drop")
    assert pytester.runpytest_inprocess("-k", "drop").ret == 1
    assert _facts(pytester) == (True, {"drop": False, "force": True})


def test_facts_of_several_processes_come_together(pytester: pytest.Pytester) -> None:
    _suite(pytester)
    result = pytester.runpytest_inprocess("-n", "2")
    result.stdout.fnmatch_lines(["*docs/support.json and docs/support.md are not what*"])
    assert _facts(pytester) == (True, {"drop": True, "force": True})
    stored = json.loads((pytester.path / "facts" / "facts.json").read_text())
    assert {fact["test"] for fact in stored["facts"]} == {
        "inner/test_cells.py::test_cell[drop]",
        "inner/test_cells.py::test_cell[force]",
    }
    assert pytester.runpytest_inprocess("-n", "2", "-k", "drop").ret == 0
    assert _facts(pytester)[0], "a partial run leaves the whole one's facts"


def test_a_word_that_the_table_does_not_know_fails_its_test(tmp_path: Path) -> None:
    record = SupportRecorder(tmp_path / "facts.json").record("a.py::t")
    with pytest.raises(ValueError, match="eager, compiled"):
        record("Mixtral", "drop", mode="graph")  # type: ignore[arg-type]
