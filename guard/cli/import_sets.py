"""`moe-guard import`: other tools' lists of experts, as sets of a profile."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from guard.cli.output import err, fail
from guard.errors import GuardError


class FormatOption(StrEnum):
    STEERMOE = "steermoe"
    EASYSTEER = "easysteer"
    ESFT = "esft"
    MASK = "mask"


def import_sets(
    file: Annotated[Path, typer.Argument(help="The list. Nothing in it is executed.")],
    kind: Annotated[FormatOption, typer.Option("--format", help="Whose list it is.")],
    profile: Annotated[Path, typer.Option(help="The profile of the model that it is for.")],
    prefix: Annotated[
        str | None, typer.Option(help="Sets are called PREFIX-raised and so on; by default the format.")
    ] = None,
    least_effect: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of a table's risk difference.")
    ] = 0.3,
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the profile there, and not in its place.")
    ] = None,
) -> None:
    """Add the experts of FILE to a profile, under names that it does not have yet.

    A list of experts says what somebody found in some data. Record prompts of your own, and see with
    `discover` whether it holds there.
    """
    from guard.cli.documents import read_document, sha256, write_profile
    from guard.discover import importers

    try:
        known = read_document(profile)
        found = importers.import_sets(file, kind.value, least_effect=least_effect)
        sets = {
            f"{prefix or kind.value}-{name}": experts for name, experts in found.sets.items() if experts
        }
        added = importers.as_profile_sets(sets)
        for name in added:
            if name in known.get("sets", {}):
                fail(f"{profile}: has a set {name!r} already; give another --prefix")
        written = _with_sets(
            known, added, {"file": file.name, "sha256": sha256(file), "note": found.note}
        )
        target = to or profile
        write_profile(target, written)
    except GuardError as error:
        fail(error)
    for name, experts in sets.items():
        err.print(f"{target}: {name}: {len(experts)} experts", soft_wrap=True, markup=False)


def _with_sets(
    known: dict[str, Any], added: dict[str, list[dict[str, Any]]], source: dict[str, str]
) -> dict[str, Any]:
    provenance = known.get("provenance")
    before: dict[str, Any] = provenance if isinstance(provenance, dict) else {"before": provenance}
    imported = [*before.get("imported", []), source | {"sets": sorted(added)}]
    return {
        **known,
        "sets": {**known.get("sets", {}), **added},
        "provenance": {**before, "imported": imported},
    }
