"""SIGHUP in processes of their own: in a server it asks for a look at the policies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import guard_vllm

ROOT = Path(guard_vllm.__file__).parents[1]
CHECKOUT = Path(__file__).parents[3]

API_SERVER = """
import queue, signal, sys
signal.signal(signal.SIGHUP, lambda number, frame: print("earlier", flush=True))
from guard_vllm import hangup
hangup.take_hangups()
hangup.take_hangups()
asked = queue.SimpleQueue()
hangup.listeners.append(lambda: asked.put(True))
print("ready", flush=True)
asked.get()
print("asked", flush=True)
"""

PARENT = """
import multiprocessing, sys, time
from guard_vllm import hangup

def serve(ready, asked):
    hangup.take_hangups()
    hangup.listeners.append(asked.set)
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    hangup.take_hangups()
    context = multiprocessing.get_context("fork")
    events = {name: (context.Event(), context.Event()) for name in ("ApiServer_0", "ApiServer_1")}
    for name, given in events.items():
        context.Process(target=serve, name=name, args=given, daemon=True).start()
    for ready, _ in events.values():
        ready.wait()
    print("ready", flush=True)
    events["ApiServer_0"][1].wait()
    print("asked", [asked.is_set() for _, asked in events.values()], flush=True)
"""


def lines_after_hangup(program: str) -> list[str]:
    path = os.pathsep.join(map(str, (CHECKOUT, ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        return process.communicate(timeout=30)[0].splitlines()
    finally:
        process.kill()
        process.wait()


def test_a_hangup_reaches_who_listens_and_who_took_it_before() -> None:
    assert sorted(lines_after_hangup(API_SERVER)) == ["asked", "earlier"]


def test_the_parent_of_several_api_servers_passes_it_on_to_the_first() -> None:
    assert lines_after_hangup(PARENT) == ["asked [True, False]"]
