"""Files that hold what is in force: whole or not there at all, and their owner's alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from guard.source.source import out_of_reach


def write_private(path: Path, content: bytes, setting: str) -> None:
    """setting: what to set where the folder cannot be written. Raises PolicyError there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # made with 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise out_of_reach(
            str(path), f"cannot be written: {error.strerror}; set {setting} to a folder that can be"
        ) from error
