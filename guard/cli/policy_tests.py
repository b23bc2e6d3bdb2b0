"""`moe-guard test`: the suites beside policies."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, out


class Format(StrEnum):
    TEXT = "text"
    JUNIT = "junit"
    JSON = "json"


def run_policy_tests(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders with suites, suites, or the policies beside them.")
    ],
    output: Annotated[Format, typer.Option("--format", help="How to print results.")] = Format.TEXT,
    wanted: Annotated[
        str | None, typer.Option("--filter", help="Only cases whose suite or name has this in it.")
    ] = None,
    require_coverage: Annotated[
        bool,
        typer.Option(
            "--require-coverage",
            help="Fail where a rule has no case in which it fires, or none in which it stays silent.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="List the cases that pass too.")
    ] = False,
) -> None:
    """Run policy tests. Exits with 1 if a case fails, or a suite or policy cannot be read."""
    # Loaded here, because the other commands need not wait for torch.
    import torch

    from guard.cli.policy_test_report import as_json, as_junit, print_text
    from guard.testing.run import run_suites
    from guard.testing.suite import find_suites

    torch.set_num_threads(1)  # steps are small: more threads would wait for one another

    began = time.perf_counter()
    found = find_suites(paths)
    results = run_suites(found.suites, found.tested, wanted)
    faults = tuple(sorted({*found.faults, *results.faults}))
    for fault in faults:
        err.print(str(fault), soft_wrap=True, markup=False)
    if not found.suites and not faults:
        err.print(
            f"no suite below {', '.join(map(str, paths))}: write a file of kind: PolicyTest beside the "
            "policies, such as tests.yaml",
            soft_wrap=True,
            markup=False,
        )
    elif wanted is not None and not results.cases and not faults:
        err.print(f"no case matches --filter {wanted}", soft_wrap=True, markup=False)
    uncovered = results.uncovered if require_coverage else ()
    match output:
        case Format.JSON:
            out.print_json(as_json(results, faults))
        case Format.JUNIT:
            out.print(as_junit(results, faults, uncovered), soft_wrap=True, markup=False)
        case Format.TEXT:
            print_text(out, results, time.perf_counter() - began, verbose=verbose, wanted=wanted)
    if results.failed or faults or not results.suites or uncovered:
        raise typer.Exit(1)
