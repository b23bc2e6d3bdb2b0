"""Servers started with `moe-guard serve`, as an operator starts them; each once per session."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.frontend.tiny_model import write_tiny_model
from tests.support.ports import free_port
from tests.support.trace_collector import TraceCollector

POLICIES = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: stop-output, severity: critical}
spec:
  mode: audit
  experts: {all: [{layers: 0-1, experts: [0-7]}]}
  rules:
    # Every token chooses 2 experts in each of 2 layers: true at the third output position.
    - name: third
      when: {count: {experts: all, over: output, atLeast: 12}}
      then: {block: {message: This request was stopped by policy.}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: stop-prompt, severity: high}
spec:
  mode: audit
  experts: {all: [{layers: 0-1, experts: [0-7]}]}
  rules:
    - name: any
      when: {count: {experts: all, over: prompt, atLeast: 1}}
      then: {block: {message: ""}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: reroute}
spec:
  mode: audit
  experts: {some: [{layers: 0-1, experts: [0-4]}]}
  rules:
    - name: always
      when: always
      then: {mask: {experts: some}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: watch, severity: info}
spec:
  mode: enforce
  experts: {all: [{layers: 0-1, experts: [0-7]}]}
  rules:
    - name: longer-than-two
      match: {phase: output}
      when: {count: {experts: all, over: output, atLeast: 8}}
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: by-tenant, severity: info}
spec:
  mode: enforce
  experts: {all: [{layers: 0-1, experts: [0-7]}]}
  rules:
    - name: first
      match: {phase: output, labels: {tenant: [blue, red]}}
      when: {count: {experts: all, over: output, atLeast: 4}}
      then: {block: {message: Not for blue.}}
  exceptions:
    - {name: red-team, match: {labels: {tenant: red}}}
"""

RED_KEY = "sk-of-the-red-team"

START_TIMEOUT_S = 600.0

_CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Server:
    address: str
    decision_log: Path
    log: Path
    client: openai.OpenAI
    policies: Path  # the file, where the server was given text
    pid: int  # of `moe-guard serve`

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels, as Prometheus would scrape them."""
        total = 0.0
        for line in httpx.get(f"{self.address}/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}\{{([^}}]*)\}} (\S+)", line)
            if match and all(f'{key}="{value}"' in match[1] for key, value in labels.items()):
                total += float(match[2])
        return total

    def decisions(self, request_id: str) -> list[dict[str, Any]]:
        lines = self.decision_log.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["request_id"].startswith(request_id)]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Events travel beside the answers; they may come a little later."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.05)


@contextmanager
def serving(
    folder: Path,
    model: Path,
    *arguments: str,
    policies: str | Path = POLICIES,
    environment: Mapping[str, str] | None = None,
    python_path: Sequence[Path] = (),
    ends: bool = False,
) -> Iterator[Server]:
    """A running server. policies: a folder, or YAML text; python_path: searched before the checkout;
    ends: it may end by itself, which is a failure else."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policies, str):
        policy_folder = folder / "policies"
        policy_folder.mkdir()
        policy_file = policy_folder / "all.yaml"
        policy_file.write_text(policies)
    else:
        policy_folder = policy_file = policies
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    decision_log, log_path = folder / "decisions.jsonl", folder / "server.log"
    command = [sys.executable, "-c", "from guard.cli import main; main()", "serve", str(model)]
    command += ["--policies", str(policy_folder), "--decision-log", str(decision_log)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32"]  # a bfloat16 kernel is an illegal instruction on some hosts
    command += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
    command += ["--num-gpu-blocks-override", "1024", *arguments]  # or the KV cache takes a gigabyte
    checkout = (*python_path, _CHECKOUT, _CHECKOUT / "integrations" / "vllm")
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **(environment or {})}
    env["PYTHONPATH"] = os.pathsep.join(map(str, checkout))
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    server = Server(address, decision_log, log_path, client, policy_file, process.pid)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "MoE Guard is live; metrics" not in server.log.read_text(errors="replace"):
            tail = server.log.read_text(errors="replace")[-4000:]
            assert process.poll() is None, f"the server ended:\n{tail}"
            assert time.monotonic() < deadline, f"the server did not start:\n{tail}"
            time.sleep(0.5)
        yield server
        tail = server.log.read_text(errors="replace")[-8000:]
        assert ends or process.poll() is None, f"the server ended:\n{tail}"
    finally:
        client.close()
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    write_tiny_model(folder)
    return folder


ADMIN_KEY = "key-of-alice"


@pytest.fixture(scope="package")
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as collecting:
        yield collecting


@pytest.fixture(scope="package")
def server(
    tiny_model: Path, collector: TraceCollector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys.yaml"
    keys.write_text(f"sha256:{hashlib.sha256(RED_KEY.encode()).hexdigest()}: {{tenant: red}}\n")
    keys.chmod(0o600)
    people = folder / "people.yaml"
    people.write_text(f"{ADMIN_KEY}: {{name: alice, role: admin}}\n")
    people.chmod(0o600)
    options = ["--label-header", "tenant=X-Tenant", "--api-key-labels", str(keys)]
    options += ["--admin-keys", str(people), "--state-dir", str(folder / "state")]
    options += ["--otlp-traces-endpoint", collector.url]
    traced = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with serving(folder, tiny_model, *options, environment=traced) as running:
        yield running


@pytest.fixture(scope="package")
def two_api_servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two_api_servers")
    with serving(folder, tiny_model, "--api-server-count", "2", "--redact-reasons") as running:
        yield running
