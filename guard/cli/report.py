"""`moe-guard report`: what `discover` and `calibrate` found, as one page with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import err, fail
from guard.errors import GuardError


def report(
    documents: Annotated[
        list[Path], typer.Argument(help="JSON that `discover --out` and `calibrate --report` wrote.")
    ],
    to: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
) -> None:
    """Put findings on one page that opens anywhere and fetches nothing."""
    try:
        import matplotlib  # noqa: F401 - not every installation has it
    except ImportError:
        fail("report needs matplotlib; install moe-guard[discover]")
    from guard.discover.errors import DiscoverError
    from guard.discover.report import html_report

    found = []
    try:
        for path in documents:
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DiscoverError(f"{path}: cannot be read as JSON: {error}") from error
            if not isinstance(document, dict):
                raise DiscoverError(f"{path}: is no report: it is not a JSON object")
            found.append(document)
        page = html_report(found)
    except GuardError as error:
        fail(error)
    to.write_text(page, encoding="utf-8")
    err.print(f"{to}: written", soft_wrap=True, markup=False)
