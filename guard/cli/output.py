"""How the command speaks: results on standard output, everything else on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

from guard.errors import GuardError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def fail(error: GuardError | str) -> NoReturn:
    """Print what is wrong, one fault a line and never wrapped, and exit with 1."""
    err.print(str(error), soft_wrap=True, markup=False)
    raise typer.Exit(1)
