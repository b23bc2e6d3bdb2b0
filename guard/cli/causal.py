"""`moe-guard causal`: what masking a set of a profile does, beside random sets."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from guard.cli.output import err, fail, out
from guard.cli.vllm_process import run_job, vllm_arguments
from guard.errors import GuardError


class MethodOption(StrEnum):
    REROUTE = "reroute"
    DROP = "drop"
    DROP_RENORM = "drop_renorm"


def causal(
    model: Annotated[str, typer.Argument(help="The model, as vLLM takes it.")],
    profile: Annotated[Path, typer.Option(help="Its profile; the outcome is written into it.")],
    set_name: Annotated[str, typer.Option("--set", help="The set of the profile to mask.")],
    traces: Annotated[
        list[Path],
        typer.Option("--trace", help="Traces that say how much each expert is used; may be repeated."),
    ],
    texts: Annotated[
        Path,
        typer.Option(
            help="JSON lines with `prompt` or `messages` and a label; of a chat that ends with an "
            "answer the answer's loss counts."
        ),
    ],
    target: Annotated[str, typer.Option(help="The label of texts whose loss is to rise.")],
    reference: Annotated[
        str, typer.Option(help="The label of texts that are to stay as they are.")
    ] = "benign",
    label: Annotated[str, typer.Option(help="The field of a text that holds its label.")] = "label",
    tasks: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `prompt` or `messages` and `answer`: exact tasks."),
    ] = None,
    method: Annotated[MethodOption, typer.Option(help="Of the mask.")] = MethodOption.REROUTE,
    random: Annotated[int, typer.Option(min=5, max=1000, help="How many random sets.")] = 10,
    least_ratio: Annotated[
        float, typer.Option(min=1.0, help="Of the target's increase to that of random sets.")
    ] = 4.0,
    most_collateral: Annotated[
        float, typer.Option(min=0.0, help="The largest increase of the reference's loss, as a share.")
    ] = 0.02,
    override: Annotated[
        str, typer.Option(help="Why policies may mask the set even where it does not pass.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of the answer to a task.")] = 64,
    report: Annotated[
        Path | None, typer.Option(help="Write what was found as JSON, for `moe-guard report`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    vllm: Annotated[
        str, typer.Option("--vllm", help="Arguments of vllm.LLM, as a JSON object.")
    ] = "{}",
) -> None:
    """Mask a set and random sets of the same layers and use, and compare what it does to texts.

    Exits with 2 where the set does not pass; then no policy masks it, unless --override says why.
    """
    from guard.cli.causal_run import CausalRun, Labels
    from guard.cli.documents import write_document, write_profile
    from guard.discover.causal import CausalDemands

    arguments = vllm_arguments(vllm)
    try:
        run = CausalRun.prepare(
            profile, set_name, traces, texts, tasks, Labels(label, target, reference), random, seed
        )
        with TemporaryDirectory(prefix="moe-guard-causal-") as folder:
            found_at = Path(folder, "found.json")
            job: dict[str, Any] = run.job(model, method.value, max_tokens, found_at, arguments)
            run_job("guard_vllm.causal_offline", job)
            measured = json.loads(found_at.read_text(encoding="utf-8"))
        check = run.check(measured, method.value, CausalDemands(least_ratio, most_collateral))
        write_profile(profile, run.profile_with(check, override))
        if report is not None:
            write_document(report, check.as_report(set_name, run.data))
    except GuardError as error:
        fail(error)
    out.print(check.verdict, soft_wrap=True, markup=False)
    out.print(run.table(check))
    err.print(f"{profile}: causal: {set_name}", soft_wrap=True, markup=False)
    if not check.passed:
        raise typer.Exit(2)
