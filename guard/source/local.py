"""A document in a file, read as one at a URL is: whole, within limits, and only when it changed."""

from __future__ import annotations

import os
from pathlib import Path

from guard.policy.regular_file import NotRegularError, open_regular
from guard.source.http import Reply
from guard.source.source import out_of_reach


def read_local(path: Path, *, max_bytes: int, etag: str | None = None) -> Reply:
    """Raises PolicyError where it cannot be had, is too large, or is no regular file."""
    try:
        with open_regular(path) as stream:
            status = os.fstat(stream.fileno())
            tag = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
            if tag == etag:
                return Reply(None, etag)
            content = stream.read(max_bytes + 1)
    except NotRegularError as error:
        message = "is no regular file; with policy_key give the file of a signed bundle, or its URL"
        raise out_of_reach(str(path), message) from error
    except OSError as error:
        raise out_of_reach(str(path), f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise out_of_reach(str(path), f"is larger than {max_bytes} bytes")
    return Reply(content, tag)
