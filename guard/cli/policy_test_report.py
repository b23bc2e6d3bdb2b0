"""The results of policy tests, for people, for CI, and for programs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guard.policy.fault import Fault, Location
from guard.testing.run import CaseResult, Results, RuleCoverage


def print_text(
    console: Console, results: Results, seconds: float, *, verbose: bool, wanted: str | None
) -> None:
    """A table of suites, every failure with its place, and which rules lack a case."""
    table = Table("suite", "cases", "failed", "seconds", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for suite in results.suites:
        failed = sum(not case.passed for case in suite.cases)
        style = "red" if failed else None
        table.add_row(
            Text(suite.suite), str(len(suite.cases)), str(failed), f"{suite.seconds:.2f}", style=style
        )
    console.print(table)
    for case in results.cases:
        if verbose or not case.passed:
            _print_case(console, case)
    if wanted is None:
        _print_coverage(console, results.coverage)
    num_failed = len(results.failed)
    total = f"{len(results.cases)} cases, {num_failed} failed, in {seconds:.1f} s"
    console.print(Text(total, style="bold red" if num_failed else "bold green"))


def _print_case(console: Console, case: CaseResult) -> None:
    word, style = ("ok", "green") if case.passed else ("FAILED", "bold red")
    line = Text.assemble((word, style), f"  {case.suite}: {case.name}")
    console.print(line, soft_wrap=True)
    for mismatch in case.mismatches:
        console.print(Text(f"  {mismatch.location}: {mismatch.message}"), soft_wrap=True)


def _print_coverage(console: Console, coverage: Sequence[RuleCoverage]) -> None:
    missing = [one for one in coverage if one.missing]
    console.print(
        f"{len(coverage) - len(missing)} of {len(coverage)} rules fire in one case and stay "
        "silent in another"
    )
    for one in missing:
        text = f"  {one.location}: {one.rule} lacks {' and '.join(one.missing)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def as_json(results: Results, faults: Sequence[Fault]) -> str:
    return json.dumps(
        {
            "passed": len(results.cases) - len(results.failed),
            "failed": len(results.failed),
            "suites": [
                {
                    "suite": suite.suite,
                    "seconds": round(suite.seconds, 3),
                    "cases": [_case_as_json(case) for case in suite.cases],
                }
                for suite in results.suites
            ],
            "coverage": [
                {
                    "rule": one.rule,
                    **_place(one.location),
                    "fires": one.fires,
                    "silent": one.silent,
                    "missing": list(one.missing),
                }
                for one in results.coverage
            ],
            "faults": [{**_place(fault.location), "message": fault.message} for fault in faults],
        }
    )


def _case_as_json(case: CaseResult) -> dict[str, object]:
    return {
        "name": case.name,
        **_place(case.location),
        "passed": case.passed,
        "outcome": case.outcome,
        "decisions": [{"rule": rule, "position": position} for rule, position in case.fired],
        "failures": [
            {**_place(mismatch.location), "message": mismatch.message} for mismatch in case.mismatches
        ],
    }


def _place(location: Location) -> dict[str, str | int]:
    return {"file": location.file, "line": location.line, "column": location.column}


def as_junit(results: Results, faults: Sequence[Fault], uncovered: Sequence[RuleCoverage] = ()) -> str:
    """JUnit's XML: a testsuite for each suite; faults and rules without cases have their own."""
    root = ElementTree.Element("testsuites", name="moe-guard test")
    for suite in results.suites:
        cases = [
            (case.name, case.location, [f"{m.location}: {m.message}" for m in case.mismatches])
            for case in suite.cases
        ]
        _add_suite(root, suite.suite, cases, suite.seconds)
    by_file: dict[str, list[tuple[str, Location, list[str]]]] = defaultdict(list)
    for fault in faults:
        by_file[fault.location.file].append(("is valid", fault.location, [str(fault)]))
    for file, cases in by_file.items():
        _add_suite(root, file, cases, 0.0)
    if uncovered:
        lacking = [
            (one.rule, one.location, [f"{one.location}: lacks {' and '.join(one.missing)}"])
            for one in uncovered
        ]
        _add_suite(root, "coverage of rules", lacking, 0.0)
    for count in ("tests", "failures"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode")


def _add_suite(
    root: ElementTree.Element,
    name: str,
    cases: Sequence[tuple[str, Location, list[str]]],
    seconds: float,
) -> None:
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=_printable(name),
        tests=str(len(cases)),
        failures=str(sum(bool(problems) for _, _, problems in cases)),
        errors="0",
        time=f"{seconds:.3f}",
    )
    for case, location, problems in cases:
        element = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_printable(name),
            name=_printable(case),
            file=_printable(location.file),
            line=str(location.line),
            time="0",
        )
        if problems:
            message = _printable(problems[0])
            failure = ElementTree.SubElement(element, "failure", message=message, type="mismatch")
            failure.text = _printable("\n".join(problems))


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 does not have."""
    return "".join(c if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff") else "�" for c in text)
