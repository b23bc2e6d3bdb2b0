"""`moe-guard diff`: what changes in effect between two policy sets."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, out
from guard.policy import PolicyError, PolicySet, load_policies
from guard.policy.diff import Change, Effect, compare

_SAME = "no change in effect"


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


def diff(
    old: Annotated[Path, typer.Argument(help="A policy file, or a folder of them, as it was.")],
    new: Annotated[Path, typer.Argument(help="The same as it shall be.")],
    output: Annotated[
        Format, typer.Option("--format", help="markdown is for pull requests.")
    ] = Format.TEXT,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if something changes.")
    ] = False,
) -> None:
    """Compare two policy sets: what is stricter, what is looser, what else is another.

    Exits with 2 if one of them cannot be used.
    """
    before, after = _load(old), _load(new)
    changes = compare(before, after)
    match output:
        case Format.JSON:
            out.print_json(json.dumps(_as_json(before, after, changes)), ensure_ascii=False)
        case Format.MARKDOWN:
            _print(_markdown(before, after, changes))
        case Format.TEXT:
            _print(_text(before, after, changes))
    if exit_code and changes:
        raise typer.Exit(1)


def _load(path: Path) -> PolicySet:
    try:
        return load_policies(path)
    except PolicyError as error:
        err.print(str(error), soft_wrap=True, markup=False)
        raise typer.Exit(2) from error


def _print(lines: list[str]) -> None:
    for line in lines:
        out.print(line, soft_wrap=True, markup=False)


def _text(before: PolicySet, after: PolicySet, changes: list[Change]) -> list[str]:
    if not changes:
        return [f"{_SAME} (revision {after.revision})"]
    lines = [f"revision {before.revision} → {after.revision}"]
    for effect, of_effect in _groups(changes):
        lines.append(f"{effect}:")
        lines += [f"  {change.subject}: {change.message}" for change in of_effect]
    return lines


def _markdown(before: PolicySet, after: PolicySet, changes: list[Change]) -> list[str]:
    if not changes:
        return [f"**Policies**: {_SAME} (revision `{after.revision}`)."]
    lines = [f"**Policies**: revision `{before.revision}` → `{after.revision}`."]
    for effect, of_effect in _groups(changes):
        lines += ["", f"### {effect.capitalize()}", ""]
        lines += [f"- `{change.subject}`: {_escaped(change.message)}" for change in of_effect]
    return lines


def _groups(changes: list[Change]) -> list[tuple[Effect, list[Change]]]:
    groups = [(effect, [one for one in changes if one.effect is effect]) for effect in Effect]
    return [group for group in groups if group[1]]


def _escaped(text: str) -> str:
    for sign in "\\*_<|":
        text = text.replace(sign, f"\\{sign}")
    return text


def _as_json(before: PolicySet, after: PolicySet, changes: list[Change]) -> dict[str, object]:
    return {
        "old": before.revision,
        "new": after.revision,
        "changes": [
            {
                "effect": change.effect.value,
                "policy": change.policy,
                "name": change.rule,
                "what": change.what,
                "message": change.message,
            }
            for change in changes
        ],
    }
