"""What `moe-guard discover` prints for people, from the JSON that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from guard.discover.same_token import coverage

MOST_ROWS = 30


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    console.print(report["verdict"], soft_wrap=True, markup=False)
    prompts, choice = report["prompts"], report["choice"]
    console.print(
        f"{prompts['target']} prompts of {choice['target']!r} beside {prompts['reference']} of "
        f"{choice['reference']!r} in {prompts['pairs']} pairs, {prompts['tokens']} tokens, phase "
        f"{choice['phase']}",
        soft_wrap=True,
        markup=False,
    )
    for reason, count in prompts["leftOut"].items():
        console.print(f"left out: {count} prompts with {reason}", soft_wrap=True, markup=False)
    if report["experts"]:
        console.print(_experts(report))
    _print_controls(console, report)


def _experts(report: Mapping[str, Any]) -> Table:
    table = Table(
        "expert", "rate", "95 %", "same tokens", "gate mass", "log odds", "q", "stability", "topics"
    )
    for row in report["experts"][:MOST_ROWS]:
        low, high = row["interval"]
        mass, topic, same = row["massEffect"], row["topicEffect"], row["sameTokenEffect"]
        table.add_row(
            f"L{row['layer']}/E{row['expert']}",
            f"{row['effect']:+.3f}",
            f"{low:+.3f} {high:+.3f}",
            "" if same is None else f"{same:+.3f}",
            "" if mass is None else f"{mass:+.3f}",
            f"{row['logOdds']:+.2f}",
            f"{row['q']:.2g}",
            f"{row['stability']:.2f}",
            "" if topic is None else f"{topic:.3f}",
        )
    left = len(report["experts"]) - MOST_ROWS
    if left > 0:
        table.caption = f"and {left} more"
    return table


def _print_controls(console: Console, report: Mapping[str, Any]) -> None:
    controls, probe = report["controls"], report["probe"]
    shuffled = controls["flaggedWithLabelsShuffled"]
    average = sum(shuffled) / max(1, len(shuffled))
    counts = ", ".join(f"{size}: {count}" for size, count in report["countsByEffect"].items())
    lines = [
        f"experts beyond an effect of {counts}",
        f"labels shuffled within pairs, {len(shuffled)} times: {average:.2f} flagged on average, "
        f"{max(shuffled, default=0)} at most",
        f"a test that takes tokens for independent finds {controls['naiveTokenTest']}, and "
        f"{controls['naiveTokenTestWithLabelsShuffled']} with labels shuffled: do not use one",
    ]
    lines.append(coverage(controls["sameTokenShare"]))
    if controls["topicContrasts"]:
        lines.append(
            f"topics: the largest difference in {controls['topicContrasts']} contrasts of "
            "reference prompts"
        )
    if probe is not None:
        held_out = probe["aurocOfHeldOutCategory"]
        in_domain = probe["aurocInDomain"]
        lines.append(
            "linear probe, area under the ROC curve: "
            + ("" if in_domain is None else f"{in_domain:.3f} on pairs left out; ")
            + (
                ", ".join(f"{name} {auroc:.3f}" for name, auroc in held_out.items())
                + " where the category was left out"
                if held_out
                else "no category could be left out"
            )
        )
    lines.append("Routing that goes with a label is no proof that it causes it.")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
