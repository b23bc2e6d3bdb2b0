"""Policies in a file or a folder, looked at again and again.

By polling `stat`, not by the kernel's notices: those are silent on network and overlay mounts, and
they belong to the link or folder that was there when they were asked for, while a Kubernetes
ConfigMap (`..data`) and a release link (`current`) put another in its place. A poll is a `stat` for
each policy and profile, once a second, and sees all of these alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from guard.policy import Fault, PolicyTexts, read_policies
from guard.policy.texts import policy_files
from guard.source.source import out_of_reach

SETTLE_S: Final = 0.2
"""How long files must have been left alone. Longer than the steps of a file system's clock, so that
a later write cannot leave a file with the signature that it had."""

MAX_TRIES: Final = 50

Signature = tuple[object, ...]


class FileSource:
    """A set is read between two equal signatures, so it is one that lay there, never a mixture.

    pause: waits so many seconds; in tests, the moment to change something
    """

    def __init__(
        self, path: Path | str, *, seconds: float = 1.0, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._path = Path(path)
        self._seconds = seconds
        self._pause = pause
        self._profiles: tuple[str, ...] = ()  # those that the set named when it was last read
        self._seen: Signature | None = None  # of the set that was last read

    @property
    def name(self) -> str:
        return str(self._path)

    def poll(self, *, force: bool = False) -> PolicyTexts | None:
        if not force and self._signature() == self._seen:
            return None
        for _ in range(MAX_TRIES):
            before = self._signature()
            self._pause(SETTLE_S)
            texts = read_policies(self._path)
            self._profiles = tuple(text.file for text in texts.profiles)
            if self._signature() == before:
                self._seen = before
                return texts
        raise out_of_reach(
            self.name,
            f"the files do not come to rest: they changed in {MAX_TRIES} looks one after another; "
            "write them elsewhere and move them here whole",
        )

    def keep(self) -> None:
        """Nothing: the files are where they were."""

    def delay_s(self) -> float:
        return self._seconds

    def _signature(self) -> Signature:
        faults: list[Fault] = []
        files = policy_files(self._path, faults)
        looks = [_look(str(file)) for file in files] + [_look(file) for file in self._profiles]
        return (*faults, *looks)


def _look(file: str) -> Signature:
    """What changes when a file is written, replaced, removed, or reached by other links."""
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        return (file, type(error).__name__)
    identity = (status.st_dev, status.st_ino, status.st_mode)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (file, os.path.realpath(file), *identity, status.st_size, *times)
