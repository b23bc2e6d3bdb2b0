"""`moe-guard demo`: a real server, real requests, and what the guard made of them."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from guard.cli.demonstration.assets import Assets, find_assets
from guard.cli.demonstration.report import (
    acted_on,
    comparison_table,
    metrics_table,
    moved,
    rates_table,
    requests_table,
    show,
)
from guard.cli.demonstration.session import Answer, ask_all, start
from guard.cli.output import err, fail, out
from guard.errors import GuardError

HELD_OUT = ("restricted", "benign")


@dataclass(frozen=True, slots=True)
class DemoResult:
    start_seconds: float
    guarded: list[Answer]
    unguarded: list[Answer]
    held_out: dict[str, list[Answer]]
    metrics_before: str
    metrics_after: str


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    held_out: Annotated[
        bool, typer.Option(help="Send the 50 restricted and 50 benign held-out prompts too.")
    ] = False,
) -> None:
    """Serve the demo model under the demo policies, and show what fires on which prompt."""
    try:
        result = _run(find_assets(), held_out=held_out)
    except GuardError as error:
        fail(error)
    if as_json:
        out.print_json(json.dumps(_as_json(result)))
        return
    tables = [requests_table(result.guarded)]
    if result.held_out:
        tables.append(rates_table(result.held_out))
    tables.append(comparison_table(result.guarded, result.unguarded))
    tables.append(metrics_table(result.metrics_before, result.metrics_after))
    show(out, *tables)
    out.print(f"The server was up and guarded after {result.start_seconds:.0f} s. Leave it running:")
    out.print("  make serve      or: moe-guard serve demo/model --policies demo/policies")


def _run(assets: Assets, *, held_out: bool) -> DemoResult:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="moe-guard-demo-") as scratch,
        Progress(*columns, console=err) as progress,
    ):
        decision_log, server_log = Path(scratch, "decisions.jsonl"), Path(scratch, "server.log")
        task = progress.add_task("Starting vLLM with the guard in it", total=None)
        began = time.monotonic()
        server = _start(assets, decision_log, server_log)
        start_seconds = time.monotonic() - began
        shown = assets.prompts("shown")
        try:
            metrics_before = server.metrics()
            progress.update(task, description=f"Asking {len(shown)} questions under guard")
            guarded = ask_all(server, shown, decision_log)
            metrics_after = server.metrics()
            answers = {}
            for name in HELD_OUT if held_out else ():
                progress.update(task, description=f"Asking the held-out {name} questions")
                answers[name] = ask_all(server, assets.prompts(name), decision_log)
        finally:
            server.stop()
        progress.update(task, description="Starting vLLM without the guard")
        server = _start(assets, None, server_log)
        try:
            progress.update(task, description="Asking the same questions without the guard")
            unguarded = ask_all(server, shown, None)
        finally:
            server.stop()
        progress.update(task, description="Done")
    return DemoResult(start_seconds, guarded, unguarded, answers, metrics_before, metrics_after)


def _start(assets: Assets, decision_log: Path | None, server_log: Path) -> Any:
    try:
        return start(assets, decision_log, server_log)
    except GuardError as error:
        lines = server_log.read_text(errors="replace").splitlines()[-20:]
        raise type(error)("\n".join([*lines, str(error)])) from error


def _as_json(result: DemoResult) -> dict[str, Any]:
    return {
        "start_seconds": round(result.start_seconds, 1),
        "guarded": [_answer_as_json(answer) for answer in result.guarded],
        "unguarded": [_answer_as_json(answer) for answer in result.unguarded],
        "held_out": {
            name: {
                "prompts": len(answers),
                "acted_on": sum(map(acted_on, answers)),
                "blocked": sum(answer.outcome == "blocked" for answer in answers),
                "answers": [_answer_as_json(answer) for answer in answers],
            }
            for name, answers in result.held_out.items()
        },
        "metrics_moved": [
            {"metric": name, "labels": labels, "by": change}
            for (name, labels), change in moved(result.metrics_before, result.metrics_after).items()
        ],
    }


def _answer_as_json(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.prompt.id,
        "topic": answer.prompt.topic,
        "prompt": answer.prompt.text,
        "expect": answer.prompt.expect,
        "outcome": answer.outcome,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "refusal": answer.refusal,
        "decisions": answer.decisions,
    }
