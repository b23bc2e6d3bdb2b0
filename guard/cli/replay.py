"""`moe-guard replay`: what policies would have done, on recorded routing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail, out
from guard.errors import GuardError


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"
    JSONL = "jsonl"


def replay(
    traces: Annotated[list[Path], typer.Argument(help="Traces, or folders of them.")],
    policies: Annotated[Path, typer.Option(help="A policy file, or a folder of them.")],
    output: Annotated[
        Format,
        typer.Option(
            "--format", help="text: a table by rule; json: the same; jsonl: a line a decision."
        ),
    ] = Format.TEXT,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="RULE/CONDITION, or RULE/CONDITION=a,b,c: how many requests fire as the threshold "
            "changes. RULE is its name, or policy/name."
        ),
    ] = None,
    enforce: Annotated[
        list[str] | None, typer.Option(help="A policy in audit to enforce for every request.")
    ] = None,
) -> None:
    """Evaluate policies over recorded routing, which is taken as given whatever would be masked."""
    # Loaded here, because the other commands need not wait for torch.
    import torch

    from guard.cli.replay_report import print_json, print_jsonl, print_text
    from guard.cli.replay_run import Replay

    torch.set_num_threads(1)  # steps are small: more threads would wait for one another

    try:
        run = Replay.start(traces, policies, sweep or [], enforce or [])
        if output is Format.JSONL:
            print_jsonl(out, run)
        else:
            summary, sweeps = run.summary(), run.sweeps()
            (print_json if output is Format.JSON else print_text)(out, run, summary, sweeps)
    except GuardError as error:
        fail(error)
    for warning in run.warnings:
        err.print(warning, soft_wrap=True, markup=False)
