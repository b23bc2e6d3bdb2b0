"""The demo's tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guard.cli.demonstration.session import Answer

_COLOUR = {"passed": "green", "observed": "cyan", "masked": "yellow", "blocked": "red"}
_SAMPLE = re.compile(r"^(?P<name>moe_guard_\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$")


def requests_table(guarded: Sequence[Answer]) -> Table:
    """Prompt, what fired, evidence against threshold, action, what the client got."""
    table = Table(title="Guarded", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=4)
    table.add_column("what fired", ratio=3)
    table.add_column("evidence", ratio=3)
    table.add_column("action", no_wrap=True)
    table.add_column("what the client got", ratio=4)
    for answer in guarded:
        table.add_row(
            Text(answer.prompt.text),
            Text("\n".join(f"{d['policy']}/{d['rule']}" for d in answer.decisions) or "nothing"),
            Text("\n".join(_evidence(d) for d in answer.decisions)),
            Text(answer.outcome, style=_COLOUR[answer.outcome]),
            Text(_reply(answer)),
        )
    return table


def comparison_table(guarded: Sequence[Answer], unguarded: Sequence[Answer]) -> Table:
    table = Table(title="The same prompts without the guard", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=4)
    table.add_column("without the guard", ratio=5)
    table.add_column("with the guard", ratio=3)
    for with_guard, without in zip(guarded, unguarded, strict=True):
        same = with_guard.text == without.text and with_guard.finish_reason == without.finish_reason
        table.add_row(
            Text(without.prompt.text),
            Text(_reply(without)),
            Text("the same") if same else Text(_reply(with_guard), style="bold"),
        )
    return table


def metrics_table(before: str, after: str) -> Table:
    """The guard's counters that moved."""
    table = Table(title="Metrics that moved", title_justify="left")
    table.add_column("metric", overflow="fold")
    table.add_column("labels", overflow="fold")
    table.add_column("by", justify="right")
    for (name, labels), difference in moved(before, after).items():
        table.add_row(name, labels.replace('"', "").replace(",", ", "), f"{difference:g}")
    return table


def moved(before: str, after: str) -> dict[tuple[str, str], float]:
    """Change of each of the guard's counters between two scrapes, without the zeros."""
    old = _counters(before)
    changes = {key: value - old.get(key, 0.0) for key, value in _counters(after).items()}
    return {key: change for key, change in changes.items() if change}


def rates_table(held_out: Mapping[str, Sequence[Answer]]) -> Table:
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column("prompts")
    table.add_column("fired", justify="right")
    table.add_column("blocked", justify="right")
    for name, answers in held_out.items():
        fired, blocked = sum(map(acted_on, answers)), sum(a.outcome == "blocked" for a in answers)
        table.add_row(name, f"{fired} of {len(answers)}", f"{blocked} of {len(answers)}")
    return table


def acted_on(answer: Answer) -> bool:
    """A policy in force did something about it: masked or blocked."""
    return answer.outcome in ("masked", "blocked")


def show(console: Console, *tables: Table) -> None:
    for table in tables:
        console.print(table)
        console.print()


def _counters(exposition: str) -> dict[tuple[str, str], float]:
    samples = {}
    for line in exposition.splitlines():
        match = _SAMPLE.match(line)
        if match and match["name"].endswith("_total"):
            labels = re.sub(r'(model_name|engine)="[^"]*",?', "", match["labels"])
            samples[match["name"], labels] = float(match["value"])
    return samples


def _evidence(decision: dict[str, Any]) -> str:
    parts = [
        f"{e['condition']} {'unknown' if e['value'] is None else format(e['value'], '.3g')} "
        f"against {e['threshold']:.3g}"
        for e in decision["evidence"]
    ]
    return f"{'; '.join(parts)} at {decision['phase']} token {decision['position']}"


def _reply(answer: Answer) -> str:
    text = " ".join(answer.text.split())
    if answer.finish_reason != "content_filter":
        return text
    shown = f"{text} … " if text else ""
    return f"{shown}[content_filter: {answer.refusal or answer.stop_reason}]"
