"""What an example may take: processor time, memory; and not touch: files, processes, the network."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import psutil

CPU_SECONDS: Final = 10.0
"""Of an example, which are thousands of times what most of them take. Not of the clock: others may use
the machine."""

WALL_SECONDS: Final = 180.0
"""After which an example counts as waiting for something that never comes."""

MEMORY_BYTES: Final = 1 << 30
"""More than what is loaded. Examples have less than a MiB."""

_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: Final[dict[str, int]] = {
    "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rename": 2,
    "os.rmdir": 1, "os.setxattr": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
"""Events that change files, and how many of their first arguments are paths."""

_NEVER: Final = frozenset(
    {
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"),
        *("subprocess.Popen", "socket.connect", "socket.sendto", "socket.bind"),
    }
)


class _OutOfTimeError(BaseException):
    """No `except Exception` of a reader takes it for its own."""


class EffectError(BaseException):
    """A reader does what no reader does."""


class Limits:
    """For `with`, around one example. Used by the main thread.

    folder: the only one that may be written to
    """

    def __init__(self, folder: Path, *, cpu_seconds: float = CPU_SECONDS) -> None:
        self._folder = os.path.realpath(folder) + os.sep
        self._cpu_seconds = cpu_seconds
        self._effects: list[str] = []
        self._handler: Any = None

    def __enter__(self) -> Limits:
        _install_hook()
        self._effects.clear()
        self._handler = signal.signal(signal.SIGPROF, _stop)
        signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)
        _watching.append(self._take_note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _watching.remove(self._take_note)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._handler)
        if self._effects:  # also where the reader swallowed the error
            raise AssertionError(f"it does what no reader does: {self._effects[0]}") from error
        if isinstance(error, _OutOfTimeError):
            took = f"it takes more than {self._cpu_seconds:g} s of the processor"
            raise AssertionError(took) from error

    def _take_note(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            paths = args[:1] if isinstance(args[2], int) and args[2] & _WRITES else ()
        elif event in _CHANGES:
            paths = args[: _CHANGES[event]]
        elif event in _NEVER:
            self._refuse(f"{event}{args!r}"[:500])
            return
        else:
            return
        for path in paths:
            if not isinstance(path, int) and not self._may_write(os.fsdecode(path)):
                self._refuse(f"{event} {path!r}"[:500])

    def _may_write(self, path: str) -> bool:
        absolute = os.path.abspath(path)  # no link is followed: `realpath` would ask the disk each time
        return absolute.startswith(self._folder) or absolute == os.devnull or "__pycache__" in absolute

    def _refuse(self, what: str) -> None:
        self._effects.append(what)
        raise EffectError(what)


def limit_memory() -> None:
    """Of this process, from what it has now. Not to be taken back."""
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Watchdog:
    """Ends this process, with the place where it hangs, unless it is told again and again not to."""

    def tell(self) -> None:
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def _stop(_: int, frame: FrameType | None) -> None:
    raise _OutOfTimeError


_watching: list[Callable[[str, tuple[Any, ...]], None]] = []
_lock: Final = threading.Lock()
_is_installed = False


def _install_hook() -> None:
    """Python takes none back, so there is one, and it asks who is watching."""
    global _is_installed
    with _lock:
        if not _is_installed:
            _is_installed = True
            sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for take_note in _watching:
        take_note(event, args)
