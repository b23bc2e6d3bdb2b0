"""`moe-guard check`: every fault in policies, without a server."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import fail, out
from guard.policy import Fault, PolicyError, PolicySet, load_policies
from guard.program.configuration import TopologyError, topology_from_folder
from guard.program.fit import check_against
from guard.program.topology import Topology


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


def check(
    paths: Annotated[list[Path], typer.Argument(help="Policy files, or folders of them.")],
    model: Annotated[
        Path | None,
        typer.Option(help="A model's folder, to check layers, experts and masks against."),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print faults.")] = Format.TEXT,
) -> None:
    """Check policies. Prints file:line:column: message for each fault, and exits with 1 if any."""
    try:
        topology = None if model is None else topology_from_folder(model)
    except TopologyError as error:
        fail(error)
    checked = [_check(path, topology) for path in paths]
    faults = sorted(fault for _, found in checked for fault in found)
    if output is Format.JSON:
        out.print_json(json.dumps([_as_json(fault) for fault in faults]))
    else:
        for fault in faults:
            out.print(str(fault), soft_wrap=True, markup=False)
        if not faults:
            for path, (policies, _) in zip(paths, checked, strict=True):
                out.print(_summary(path, policies), soft_wrap=True, markup=False)
    if faults:
        raise typer.Exit(1)


def _check(path: Path, topology: Topology | None) -> tuple[PolicySet | None, list[Fault]]:
    try:
        policies = load_policies(path)
    except PolicyError as error:
        return None, list(error.faults)
    return policies, [] if topology is None else check_against(policies, topology)


def _summary(path: Path, policies: PolicySet | None) -> str:
    assert policies is not None, "no fault, yet no policies"
    rules = sum(len(policy.rules) for policy in policies.policies)
    return f"{path}: ok, {len(policies.policies)} policies, {rules} rules, revision {policies.revision}"


def _as_json(fault: Fault) -> dict[str, str | int]:
    location = fault.location
    return {
        "file": location.file,
        "line": location.line,
        "column": location.column,
        "message": fault.message,
    }
