"""The guard logs where vLLM does, in a process of its own: a test has a logging of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import guard_vllm
import pytest

CHECKOUT = Path(__file__).parents[3]

PROGRAM = """
import logging, sys
vllm = logging.getLogger("vllm")
vllm.setLevel("INFO")
vllm.addHandler(logging.StreamHandler(sys.stdout))
OWN
from guard_vllm.logs import log_where_vllm_logs
log_where_vllm_logs()
log_where_vllm_logs()
LATER
for name in ("guard.source.watcher", "guard_vllm.watching"):
    logging.getLogger(name).info("said by %s", name)
    logging.getLogger(name).debug("not said")
"""


ROOT = "logging.basicConfig(level='INFO', stream=sys.stdout, format='own %(message)s')"


@pytest.mark.parametrize(
    ("own", "later", "prefix"),
    [("", "", ""), (ROOT, "", "own "), ("", ROOT, "")],
    ids=["vLLM's alone", "the program's own", "a library's own, later"],
)
def test_each_line_is_said_once_where_the_server_logs(own: str, later: str, prefix: str) -> None:
    path = os.pathsep.join(map(str, (CHECKOUT, Path(guard_vllm.__file__).parents[1])))
    program = PROGRAM.replace("OWN", own).replace("LATER", later)
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stdout.splitlines() == [
        f"{prefix}said by guard.source.watcher",
        f"{prefix}said by guard_vllm.watching",
    ]
    assert said.stderr == ""
