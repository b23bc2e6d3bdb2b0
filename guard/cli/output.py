"""How the command speaks: results on standard output, everything else on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

from guard.errors import GuardError

# No emoji: rich reads `policy.yaml:100:5` as one.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def fail(error: GuardError | str) -> NoReturn:
    """Print what is wrong, one fault a line and never wrapped, and exit with 1."""
    err.print(str(error), soft_wrap=True, markup=False)
    raise typer.Exit(1)
