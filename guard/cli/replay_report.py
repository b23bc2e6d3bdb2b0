"""What a replay found, for people and for programs."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from guard.cli.replay_run import Replay
from guard.offline.evaluator import result_of
from guard.offline.replay import Replayed, Summary, Sweep, SweepPoint
from guard.program.program import Program
from guard.program.verdict import Firing

QUANTILES = (0.1, 0.5, 0.9)

Sweeps = Sequence[tuple[Sweep, Sequence[SweepPoint]]]


def print_text(console: Console, run: Replay, summary: Summary, sweeps: Sweeps) -> None:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in summary.outcomes.most_common())
    unseen = f", {summary.unseen} of them unseen" if summary.unseen else ""
    console.print(
        Text(
            f"{summary.requests} requests of {run.model}, {summary.tokens} tokens{unseen}; policies at "
            f"revision {run.program.revision}"
        ),
        soft_wrap=True,
    )
    if outcomes:
        console.print(Text(f"would have been: {outcomes}"), soft_wrap=True)
    table = Table(
        "rule", "applies to", "fires in", "", "decisions", "first at: 10 %", "50 %", "90 %", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for (policy, rule), count in summary.rules.items():
        positions = [count.first_positions.at(share) for share in QUANTILES]
        table.add_row(
            Text(f"{policy}/{rule}"),
            str(count.requests),
            str(count.fired),
            _percent(count.fired, count.requests),
            str(count.decisions) + (f" ({count.exempt} exempt)" if count.exempt else ""),
            *("" if position is None else str(position) for position in positions),
        )
    console.print(table)
    for sweep, points in sweeps:
        _print_sweep(console, sweep, points)
    if sweeps:
        console.print("A sweep looks at its rule alone: what other rules would block is not cut off.")


def _print_sweep(console: Console, sweep: Sweep, points: Sequence[SweepPoint]) -> None:
    table = Table(
        f"{sweep.name} {sweep.condition.comparison.value}", "fires in", "", "", box=None, pad_edge=False
    )
    for point in points:
        share = point.fired / point.requests if point.requests else 0.0
        table.add_row(
            f"{point.threshold:g}" + (" (now)" if point.is_current else ""),
            str(point.fired),
            _percent(point.fired, point.requests),
            "█" * round(30 * share),
            style="bold" if point.is_current else None,
        )
    console.print()
    console.print(table)


def print_json(console: Console, run: Replay, summary: Summary, sweeps: Sweeps) -> None:
    rules = [
        {
            "policy": policy,
            "rule": rule,
            "requests": count.requests,
            "fired": count.fired,
            "decisions": count.decisions,
            "exempt": count.exempt,
            "first_position": {
                f"p{round(100 * share)}": count.first_positions.at(share) for share in QUANTILES
            },
        }
        for (policy, rule), count in summary.rules.items()
    ]
    found = {
        "revision": run.program.revision,
        "model": run.model,
        "requests": summary.requests,
        "tokens": summary.tokens,
        "unseen_tokens": summary.unseen,
        "outcomes": dict(summary.outcomes),
        "rules": rules,
        "sweeps": [
            {
                "condition": sweep.name,
                "comparison": sweep.condition.comparison.value,
                "points": [point._asdict() for point in points],
            }
            for sweep, points in sweeps
        ],
    }
    console.print_json(json.dumps(found))


def print_jsonl(console: Console, run: Replay) -> None:
    """A line for each decision, with the keys of the decision log."""
    for replayed in run.replayed():
        for line in decisions(run.program, run.model, replayed):
            console.out(json.dumps(line), highlight=False)


def _decision_id(program: Program, request_id: str, firing: Firing) -> str:
    """The same whenever the trace is replayed under equal policies."""
    what = f"{program.revision}/{request_id}/{firing.policy}/{firing.rule}/{firing.position}"
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"moe-guard:{what}"))


def decisions(program: Program, model: str, replayed: Replayed) -> list[dict[str, Any]]:
    """One request's decisions."""
    request, outcome = replayed
    rows = {(rule.policy, rule.rule): number for number, rule in enumerate(program.rules)}
    result = result_of(program, outcome)
    lines = []
    for firing in outcome.verdict.firings:
        number = rows[firing.policy, firing.rule]
        rule, enforced = program.rules[number], bool(outcome.rules.enforced_R[number])
        action = rule.action.name.lower()
        done = {"mask": "masked", "block": "blocked"}.get(action, "observed")
        lines.append(
            {
                "decision_id": _decision_id(program, request.request_id, firing),
                "time": datetime.fromtimestamp(request.time, UTC).isoformat(timespec="milliseconds"),
                "revision": program.revision,
                "policy": firing.policy,
                "rule": firing.rule,
                "mode": "enforce" if enforced else "audit",
                "action": action,
                "severity": rule.severity.value,
                "request_id": request.request_id,
                "model": model,
                "phase": "prompt" if firing.position < request.routing.num_prompt_tokens else "output",
                "position": firing.position,
                "evidence": [
                    {
                        "condition": evidence.condition,
                        "value": None if math.isnan(evidence.value) else evidence.value,
                        "threshold": evidence.threshold,
                    }
                    for evidence in firing.evidence
                ],
                "unseen_tokens": outcome.unseen,
                "exempt": firing.exempt,
                "outcome": done if enforced else "observed",
                "request_outcome": result,
            }
        )
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
