"""What `moe-guard calibrate` found, for people and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from guard.discover.calibration import Calibrated
from guard.discover.conformal import Floats

if TYPE_CHECKING:
    from guard.cli.calibrate_run import CalibrationRun


def print_report(console: Console, run: CalibrationRun) -> None:
    table = Table("condition", "budget", "threshold", "false positives", "detected", "tokens", "AUROC")
    for one in run.found:
        for budget, outcome in one.by_budget.items():
            table.add_row(
                str(one.condition),
                f"{budget:g}",
                f"{one.condition.direction} {outcome.threshold:g}",
                str(outcome.false_positives),
                "" if outcome.detected is None else str(outcome.detected),
                "" if outcome.tokens_to_detection is None else f"{outcome.tokens_to_detection:g}",
                "" if one.auroc is None else f"{one.auroc:.3f}",
            )
    if run.baseline is not None:
        for budget, (false_positives, detected) in run.baseline.by_budget.items():
            auroc = "" if run.baseline.auroc is None else f"{run.baseline.auroc:.3f}"
            row = (f"{budget:g}", "", str(false_positives), str(detected), "0", auroc)
            table.add_row("the prompts' words alone", *row)
    for name, outcomes in run.sequential.items():
        for test in outcomes:
            table.add_row(
                f"{test.test} of {name} (Wald's bound: {test.wald})",
                f"{test.budget:g}",
                f"above {test.threshold:g}",
                str(test.false_positives),
                str(test.detected),
                "" if test.tokens_to_detection is None else f"{test.tokens_to_detection:g}",
                "",
            )
    console.print(table)
    console.print(
        "Rates are of prompts set aside, with exact 95 % intervals. They hold for prompts like "
        "these, and for no others.",
        soft_wrap=True,
        markup=False,
    )


def report_json(run: CalibrationRun) -> dict[str, Any]:
    """Everything, with the scores of the prompts set aside."""
    text = run.baseline
    sequential = [
        {"set": name, **outcome._asdict()}
        | {key: getattr(outcome, key)._asdict() for key in ("false_positives", "detected", "wald")}
        for name, outcomes in run.sequential.items()
        for outcome in outcomes
    ]
    return {
        "kind": "Calibration",
        "conditions": [
            facts(one)
            | {
                "direction": one.condition.direction,
                "scores": {"benign": _known(one.benign_N), "target": _known(one.target_N)},
            }
            for one in run.found
        ],
        "sequential": sequential,
        "text": None
        if text is None
        else {
            "auroc": text.auroc,
            "budgets": [
                {
                    "budget": budget,
                    "falsePositives": false_positives._asdict(),
                    "detected": detected._asdict(),
                }
                for budget, (false_positives, detected) in text.by_budget.items()
            ],
            "scores": {"benign": _known(text.benign_N), "target": _known(text.target_N)},
        },
    }


def facts(one: Calibrated) -> dict[str, Any]:
    return {
        "condition": str(one.condition),
        "auroc": one.auroc,
        "budgets": [
            {
                "budget": budget,
                "threshold": outcome.threshold,
                "falsePositives": outcome.false_positives._asdict(),
                "detected": None if outcome.detected is None else outcome.detected._asdict(),
                "tokensToDetection": outcome.tokens_to_detection,
            }
            for budget, outcome in one.by_budget.items()
        ],
    }


def _known(values_N: Floats) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 6) for value in values_N.tolist()]
