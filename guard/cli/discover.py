"""`moe-guard discover`: which experts go with a label of recorded prompts."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail, out
from guard.errors import GuardError


class PhaseOption(StrEnum):
    PROMPT = "prompt"
    OUTPUT = "output"
    ANY = "any"


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


def discover(
    traces: Annotated[
        list[Path], typer.Argument(help="Traces of `moe-guard record`, or folders of them.")
    ],
    target: Annotated[
        str, typer.Option(help="The label of the prompts that experts are looked for of.")
    ],
    reference: Annotated[str, typer.Option(help="The label of the prompts beside them.")] = "benign",
    label: Annotated[str, typer.Option(help="The field of a prompt that holds its label.")] = "label",
    pair: Annotated[str, typer.Option(help="The field that two prompts of a pair share.")] = "pair_id",
    category: Annotated[str, typer.Option(help="The field that holds a prompt's topic.")] = "category",
    phase: Annotated[PhaseOption, typer.Option(help="Which tokens count.")] = PhaseOption.OUTPUT,
    first_tokens: Annotated[
        int, typer.Option(min=4, help="Of each output so many tokens count, at most.")
    ] = 64,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Compare prompts that have no pairs.")
    ] = False,
    q: Annotated[float, typer.Option(min=0.0, max=1.0, help="The false discovery rate.")] = 0.05,
    least_effect: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The least difference of activation rates.")
    ] = 0.1,
    least_stability: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The least share of resamples.")
    ] = 0.9,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many count as the top of a resample; by default 1 % of all, 10 at least."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    output: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.TEXT,
    to: Annotated[Path | None, typer.Option("--out", help="Write the JSON there as well.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Write sets, a probe, baselines and statistics there; it may not exist yet."),
    ] = None,
    set_name: Annotated[
        str | None, typer.Option("--set", help="Their name in the profile; by default the target.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Take the profile's baselines from these reference prompts though it has some.",
        ),
    ] = False,
    licence: Annotated[str, typer.Option(help="Of the profile.")] = "",
) -> None:
    """Find experts that go with a label, with what chance and topic alone would show.

    Exits with 0 whether or not there is a signal: the first line says which.
    """
    try:
        import sklearn  # noqa: F401 - not every installation has it
    except ImportError:
        fail("discover needs scikit-learn and scipy; install moe-guard[discover]")
    from guard.cli.discover_report import print_report
    from guard.cli.documents import read_document, sha256, versions, write_document, write_profile
    from guard.discover.baselines import baseline_rates
    from guard.discover.discovery import Demands
    from guard.discover.discovery import discover as find
    from guard.discover.probe import fit_probe, probe_table
    from guard.discover.profile_document import Source, with_discovery
    from guard.discover.summary import summary
    from guard.discover.table import Choice, read_table
    from guard.policy.model import Phase
    from guard.trace.reader import trace_files

    choice = Choice(
        target, reference, label, pair, category, Phase(phase.value), first_tokens, not unpaired
    )
    demands = Demands(
        q=q, least_effect=least_effect, least_stability=least_stability, top=top, seed=seed
    )
    try:
        with err.status("reading traces") as status:
            files = [file for path in traces for file in trace_files(path)]
            table = read_table(files, choice)
            found = find(table, demands, say=status.update)
            status.update("the probe")
            probe = fit_probe(probe_table(files, choice, table))
            report = summary(found, choice, probe, {path.name: sha256(path) for path in files})
        if to is not None:
            write_document(to, report)
        if profile is not None:
            known = read_document(profile) if profile.exists() else None
            source = Source(report, "moe-guard discover", versions(), licence)
            name = set_name or target
            has_some = known is not None and "baselines" in known
            rates = None if has_some and not baselines else baseline_rates(files, choice)
            written = with_discovery(known, name, found, probe, rates, source)
            write_profile(profile, written)
            err.print(f"{profile}: {name}", soft_wrap=True, markup=False)
    except GuardError as error:
        fail(error)
    if output is Format.JSON:
        out.print_json(json.dumps(report))
    else:
        print_report(out, report)
