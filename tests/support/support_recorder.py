"""The pytest plugin behind the fixture `support_record`: keeps facts, compares them with docs/.

Facts ride on a test's report, so that they reach the process that started pytest-xdist's others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.support_docs import DOCS, FACTS, differing
from tests.support.support_facts import (
    ONE_WORKER,
    Fact,
    Method,
    Mode,
    Runner,
    as_json,
    facts_of,
    feature_fact,
    from_json,
)

_PROPERTY = "support"
"""Of a test's report."""


class SupportRecord:
    """What the fixture `support_record` gives to one test."""

    def __init__(self, test: str) -> None:
        self._test = test
        self._said: list[Callable[[bool], list[Fact]]] = []

    def __call__(
        self,
        family: str,
        *methods: Method,
        runner: Runner = "v1",
        mode: Mode = "eager",
        parallelism: str = ONE_WORKER,
        refused: str = "",
        untestable: str = "",
    ) -> None:
        """Cells of a router family."""

        def facts(passed: bool) -> list[Fact]:
            return facts_of(
                self._test,
                passed,
                family,
                methods,
                runner=runner,
                mode=mode,
                parallelism=parallelism,
                refused=refused,
                untestable=untestable,
            )

        self._say(facts)

    def feature(
        self,
        name: str,
        *,
        runner: Runner | Literal["any"] = "any",
        mode: Mode = "eager",
        refused: str = "",
        untestable: str = "",
    ) -> None:
        """A cell of one of `FEATURES`."""

        def facts(passed: bool) -> list[Fact]:
            return [
                feature_fact(
                    self._test,
                    passed,
                    name,
                    runner=runner,
                    mode=mode,
                    refused=refused,
                    untestable=untestable,
                )
            ]

        self._say(facts)

    def _say(self, facts: Callable[[bool], list[Fact]]) -> None:
        facts(True)  # a wrong word fails the test that says it
        self._said.append(facts)

    def facts(self, passed: bool) -> list[Fact]:
        return [fact for said in self._said for fact in said(passed)]


class SupportRecorder:
    """Facts of this session. A whole run replaces those on disk, a partial one adds to them."""

    def __init__(self, facts_path: Path = FACTS, docs: Path = DOCS) -> None:
        self._facts_path = facts_path
        self._docs = docs
        self._facts: dict[str, list[Fact]] = {}
        self._records: dict[str, SupportRecord] = {}
        self._whole = True
        self._differing: list[str] = []

    def record(self, test: str) -> SupportRecord:
        self._records[test] = SupportRecord(test)
        return self._records[test]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" and (record := self._records.pop(item.nodeid, None)):
            report.user_properties.append((_PROPERTY, as_json(record.facts(report.passed))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, stored in report.user_properties:
            if name == _PROPERTY and report.when == "call":
                for fact in from_json(stored):  # type: ignore[arg-type]
                    self._facts.setdefault(fact.test, []).append(fact)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._whole = self._whole and not items

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """One of pytest-xdist's processes ended."""
        self._whole = self._whole and error is None and node.workeroutput[_PROPERTY]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        config = session.config
        if hasattr(config, "workeroutput"):  # one of several processes; the first one stores
            config.workeroutput[_PROPERTY] = self._whole
            return
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        by_testpaths = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        whole = self._whole and ended and by_testpaths and not session.shouldstop
        whole = whole and not session.shouldfail and not config.option.collectonly
        if not any(self._facts.values()) or config.option.collectonly:
            return
        self._store(whole)
        if whole:
            facts = [fact for found in self._facts.values() for fact in found]
            self._differing = differing(facts, self._docs)
            if self._differing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _store(self, whole: bool) -> None:
        facts, stored_whole = dict(self._facts), whole
        if not whole and self._facts_path.exists():
            stored = json.loads(self._facts_path.read_text(encoding="utf-8"))
            stored_whole = stored["whole"]
            for fact in from_json(stored["facts"]):
                if fact.test not in self._facts:
                    facts.setdefault(fact.test, []).append(fact)
        everything = [fact for test in sorted(facts) for fact in facts[test]]
        self._facts_path.parent.mkdir(exist_ok=True)
        text = json.dumps({"whole": stored_whole, "facts": as_json(everything)}, indent=1)
        self._facts_path.write_text(text, encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._differing:
            terminalreporter.section("support table", red=True)
            names = " and ".join(f"docs/{name}" for name in self._differing)
            terminalreporter.line(
                f"FAILED: {names} are not what these tests showed; run make support and commit that"
            )
