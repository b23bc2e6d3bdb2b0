"""`moe-guard check`: every fault in policies and what in them is unwise, without a server."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from guard.cli.output import fail, out
from guard.policy import Fault, Location, PolicyError, PolicySet, load_policies
from guard.policy.lint import Code, Finding, Level, lint
from guard.program.configuration import TopologyError, topology_from_folder
from guard.program.fingerprint import FingerprintError, fingerprint_faults
from guard.program.fit import check_against
from guard.program.model_shape import shape_of
from guard.program.topology import Topology


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


class _Checked(NamedTuple):
    """policies: None where there are faults that hide them"""

    policies: PolicySet | None
    faults: list[Fault]
    findings: list[Finding]


def check(
    paths: Annotated[list[Path], typer.Argument(help="Policy files, or folders of them.")],
    model: Annotated[
        Path | None,
        typer.Option(help="A model's folder, to check layers, experts and masks against."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings fail, too.")] = False,
    ignore: Annotated[
        list[Code] | None,
        typer.Option(help="A code of findings to leave out; may be given again.", metavar="CODE"),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to print faults and findings.")
    ] = Format.TEXT,
) -> None:
    """Check policies.

    Prints file:line:column: message for each fault, and exits with 1 if any. What is valid but unwise
    is a line with a code at its end; an error among them fails, a warning with --strict.
    """
    try:
        topology = None if model is None else topology_from_folder(model)
        checked = [_check(path, model, topology) for path in paths]
    except (TopologyError, FingerprintError) as error:
        fail(error)
    faults = sorted({fault for one in checked for fault in one.faults})
    left_out = frozenset(ignore or ())
    findings = sorted({f for one in checked for f in one.findings if f.code not in left_out})
    if output is Format.JSON:
        told = [*map(_fault_as_json, faults), *map(_finding_as_json, findings)]
        out.print_json(json.dumps(told))
    else:
        for line in (*faults, *findings):
            out.print(str(line), soft_wrap=True, markup=False)
        if not faults:
            for path, one in zip(paths, checked, strict=True):
                out.print(_summary(path, one.policies), soft_wrap=True, markup=False)
    if faults or any(strict or finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(1)


def _check(path: Path, model: Path | None, topology: Topology | None) -> _Checked:
    """Raises FingerprintError."""
    try:
        policies = load_policies(path)
    except PolicyError as error:
        return _Checked(None, list(error.faults), [])
    faults = [] if topology is None else check_against(policies, topology)
    faults += [] if model is None else fingerprint_faults(policies, model)
    if faults:
        return _Checked(policies, faults, [])
    shape = None if topology is None else shape_of(topology)
    return _Checked(policies, [], lint(policies, shape=shape))


def _summary(path: Path, policies: PolicySet | None) -> str:
    assert policies is not None, "no fault, yet no policies"
    rules = sum(len(policy.rules) for policy in policies.policies)
    return f"{path}: ok, {len(policies.policies)} policies, {rules} rules, revision {policies.revision}"


def _fault_as_json(fault: Fault) -> dict[str, str | int]:
    return _as_json(fault.location, fault.message, Level.ERROR, "invalid")


def _finding_as_json(finding: Finding) -> dict[str, str | int]:
    return _as_json(finding.location, finding.message, finding.level, finding.code)


def _as_json(location: Location, message: str, level: Level, code: str) -> dict[str, str | int]:
    return {
        "file": location.file,
        "line": location.line,
        "column": location.column,
        "severity": level.value,
        "code": code,
        "message": message,
    }
