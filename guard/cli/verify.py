"""`moe-guard verify`: does a model route golden prompts as it did?"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.table import Table

from guard.cli.output import fail, out
from guard.cli.record import Weights, record
from guard.errors import GuardError


def verify(
    now: Annotated[
        str,
        typer.Argument(help="The model, as vLLM takes it, or a trace of it."),
    ],
    golden: Annotated[Path, typer.Option(help="The trace of the golden prompts, from `record`.")],
    prompts: Annotated[
        Path | None, typer.Option(help="The golden prompts' file; needed unless there is a trace.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0.0, help="The largest divergence of a layer, in nats.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    vllm: Annotated[
        str, typer.Option("--vllm", help="Arguments of vllm.LLM, as a JSON object.")
    ] = "{}",
) -> None:
    """Compare the routing of golden prompts with how it was, layer by layer; exit with 2 if it drifted.

    Record them once from the weights that you trust, and verify before each start: other weights, a
    damaged quantisation or a planted backdoor change how a model routes.
    """
    from guard.discover.drift import DEFAULT_LIMIT, compare

    most = DEFAULT_LIMIT if limit is None else limit
    with TemporaryDirectory(prefix="moe-guard-verify-") as folder:
        trace = Path(now)
        if not trace.is_file():
            if prompts is None:
                fail("--prompts: say which prompts the golden trace is of, to run them again")
            trace = Path(folder, "now.moetrace")
            record(now, prompts, trace, max_tokens=1, weights=Weights.NONE, vllm=vllm)
        try:
            drift = compare(golden, trace)
        except GuardError as error:
            fail(error)
    beyond = drift.beyond(most)
    if as_json:
        layers = [layer._asdict() for layer in drift.layers]
        out.print_json(json.dumps({"limit": most, "drifted": bool(beyond), "layers": layers}))
    else:
        table = Table("layer", "divergence", "same choices", "")
        for layer in drift.layers:
            mark = "drifted" if layer in beyond else ""
            table.add_row(str(layer.layer), f"{layer.divergence:.5f}", f"{layer.agreement:.2%}", mark)
        out.print(table)
        first = f"from layer {beyond[0].layer} on" if beyond else "in no layer"
        out.print(
            f"{drift.prompts} prompts, {drift.tokens} tokens: beyond {most:g} {first}.",
            soft_wrap=True,
            markup=False,
        )
    if beyond:
        raise typer.Exit(2)
