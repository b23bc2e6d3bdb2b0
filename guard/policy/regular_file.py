"""Opens a file that others may have put there: a pipe or a device in its place must not hang a load."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegularError(OSError):
    """There is a folder, a pipe, a socket or a device."""


def open_regular(path: Path) -> BinaryIO:
    """For reading. What it is is asked of what was opened, so nothing can take its place in between.

    Raises OSError, NotRegularError.
    """
    # A pipe would wait for its other end, and a terminal become this process's own.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotRegularError(f"{path} is no regular file")
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")
