"""`moe-guard calibrate`: thresholds of a profile's conditions, by false-positive budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail, out
from guard.errors import GuardError


def calibrate(
    traces: Annotated[
        list[Path], typer.Argument(help="Traces of `moe-guard record`, or folders of them.")
    ],
    profile: Annotated[Path, typer.Option(help="The model's profile: sets, baselines, probes.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the profile there, with the new thresholds.")
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON: a list of {phase, when, alarm: above | below}. By default those that "
            "the profile has thresholds of."
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="A false-positive rate of prompts; may be given again."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The label of prompts that are to be detected.")
    ] = None,
    reference: Annotated[str, typer.Option(help="The label of benign prompts.")] = "benign",
    label: Annotated[str, typer.Option(help="The field of a prompt that holds its label.")] = "label",
    pair: Annotated[str, typer.Option(help="Prompts that share it stay together.")] = "pair_id",
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="The share of prompts that is set aside.")
    ] = 0.5,
    held_out_traces: Annotated[
        list[Path] | None,
        typer.Option(
            "--held-out-trace",
            help="Traces of other prompts to show what comes of it on, not a share: of a topic or "
            "a wrapper that no threshold was taken from. May be given again.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="The prompts' own file, for a baseline that reads their words alone."),
    ] = None,
    held_out_prompts: Annotated[
        Path | None, typer.Option(help="The same of the prompts of --held-out-trace.")
    ] = None,
    sequential: Annotated[
        list[str] | None,
        typer.Option(
            help="A set of the profile: show what SPRT and CUSUM on it would detect, and how soon."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what was found there as JSON, for `moe-guard report`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Take thresholds from benign prompts, and show on prompts set aside what comes of them."""
    try:
        import sklearn  # noqa: F401 - not every installation has it
    except ImportError:
        fail("calibrate needs scikit-learn and scipy; install moe-guard[discover]")
    import torch

    from guard.cli.calibrate_report import print_report, report_json
    from guard.cli.calibrate_run import CalibrationRun, Roles
    from guard.cli.documents import write_document, write_profile

    torch.set_num_threads(1)  # steps are small: more threads would wait for one another
    try:
        with err.status("calibrating"):
            run = CalibrationRun.start(
                traces,
                profile,
                conditions,
                budget or [0.01, 0.05],
                Roles(label, target, reference, pair),
                seed,
                held_out_traces or [],
            )
            run.calibrate(held_out, prompts, sequential or [], held_out_prompts)
        print_report(out, run)
        if report is not None:
            write_document(report, report_json(run))
        if to is not None:
            write_profile(to, run.profile_with_thresholds())
    except GuardError as error:
        fail(error)
