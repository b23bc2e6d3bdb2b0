"""SIGHUP asks a server to look at its policies now, as it asks other servers to read their files.

Where several API servers run, their parent gets the signal and passes it on to the first of them,
which reloads for all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Final

FIRST_API_SERVER: Final = "ApiServer_0"
"""What vLLM calls the process."""

listeners: list[Callable[[], None]] = []
_earlier: list[Callable[[int, Any], Any]] = []


def take_hangups() -> None:
    """From now on SIGHUP does not end this process; whoever took it before gets it as well.

    For processes that vLLM starts as servers: a program with an engine of its own decides for itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only there can a signal be taken
    earlier = signal.getsignal(signal.SIGHUP)
    if earlier is _hang_up:
        return
    _earlier[:] = [earlier] if callable(earlier) else []
    signal.signal(signal.SIGHUP, _hang_up)


def _hang_up(number: int, frame: Any) -> None:
    for listener in listeners:
        listener()
    if not listeners:
        for child in multiprocessing.active_children():
            if child.name == FIRST_API_SERVER and child.pid is not None:
                os.kill(child.pid, signal.SIGHUP)
    for earlier in _earlier:
        earlier(number, frame)
