"""Files that hold what is in force: whole or not there at all, and their owner's alone."""

from __future__ import annotations

from pathlib import Path

from guard.source.source import out_of_reach
from guard.whole_file import write_whole


def write_private(path: Path, content: bytes, setting: str) -> None:
    """setting: what to set where the folder cannot be written. Raises PolicyError there."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise out_of_reach(
            str(path), f"cannot be written: {error.strerror}; set {setting} to a folder that can be"
        ) from error
