"""Python in a process of its own: whether Triton interprets is settled when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[2]


def run_module(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m` with these arguments, from the repository's root."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=_ROOT,
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        capture_output=True,
        text=True,
        check=False,
    )
