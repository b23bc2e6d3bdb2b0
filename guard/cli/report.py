"""`moe-guard report`: what `discover`, `calibrate` and `causal` found, as one page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail
from guard.errors import GuardError


def report(
    documents: Annotated[
        list[Path],
        typer.Argument(
            help="JSON that `discover --out`, `calibrate --report` and `causal --report` wrote."
        ),
    ],
    to: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
) -> None:
    """Put findings on one page that opens anywhere and fetches nothing."""
    try:
        import matplotlib  # noqa: F401 - not every installation has it
    except ImportError:
        fail("report needs matplotlib; install moe-guard[discover]")
    from guard.cli.documents import read_document, write_text
    from guard.discover.report import html_report

    try:
        write_text(to, html_report([read_document(path) for path in documents]))
    except GuardError as error:
        fail(error)
    err.print(f"{to}: written", soft_wrap=True, markup=False)
