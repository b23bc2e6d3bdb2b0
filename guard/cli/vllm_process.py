"""Jobs that need vLLM run in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from guard.cli.output import fail


def vllm_arguments(text: str) -> dict[str, Any]:
    """Those of `--vllm`. Exits where they are no JSON object."""
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        fail(f"--vllm: not JSON: {error.msg}")
    if not isinstance(arguments, dict):
        fail("--vllm: a JSON object, such as '{\"tensor_parallel_size\": 2}'")
    return arguments


def run_job(module: str, job: Mapping[str, Any]) -> None:
    """`python -m MODULE JOB.json`, without the environment's policies. Exits where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "MOE_GUARD_POLICIES"}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, "-m", module, file.name]
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        fail(f"vLLM ended with {code}; what it said stands above")
