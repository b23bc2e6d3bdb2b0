"""A server under load whose policies change every second, every tenth time to something bad.

    .venv/bin/python -m benchmarks.reload_under_load [--seconds 60] [--rate 20] [--out FILE.json]

Starts `moe-guard serve demo/model`, sends requests at a steady rate, and replaces the policy file
once a second. Prints what became of the requests and of the reloads, how long the steps took that
held one beside the others, and whether every decision names a revision that was in force. A step
with more prompts than others is long by itself: a reload is to blame for one that is longer than
twice the median only with the time that the engine spent on it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.step_clock import VARIABLE
from guard.cli.server import GuardedServer, ServerSettings
from guard.policy import parse_policies

CHECKOUT = Path(__file__).parents[1]
BAD_EVERY = 10
OUTPUT_TOKENS = 24
LOOK_SECONDS = 0.2
BAD = "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: changing}\nspec: {rules: []\n"
PROMPT = "The museum opens at ten, and the first"


def policy(number: int) -> str:
    """Each one is another: thresholds move, masks and sets come and go, modes flip."""
    mode = "enforce" if number % 2 else "audit"
    first = 2 * (number % 3)
    extra = ""
    if number % 3 == 0:
        extra = (
            f"    - name: extra-{number}\n"
            f"      when: {{count: {{experts: other, over: 8, atLeast: {1 + number % 5}}}}}\n"
        )
    return f"""\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: changing}}
spec:
  mode: {mode}
  experts:
    flagged: [{{layers: 0-3, experts: [0]}}]
    other: [{{layers: 0-3, experts: [{first + 1}-{first + 2}]}}]
  rules:
    - name: stays
      when: {{count: {{experts: flagged, over: request, atLeast: 1}}}}
    - name: moves
      match: {{phase: output}}
      when: {{rate: {{experts: flagged, over: 16, minTokens: 4, above: {number % 90 / 1000 + 0.001}}}}}
    - name: steers
      match: {{phase: output}}
      when: {{count: {{experts: flagged, over: output, atLeast: {1 + number % 4}}}}}
      then: {{mask: {{experts: flagged, until: 8}}}}
{extra}"""


@dataclass
class Outcome:
    """What came of one run. Steps in milliseconds."""

    seconds: float
    requests: int = 0
    lost: int = 0
    reloads: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    revisions_decided: int = 0
    decisions: int = 0
    decisions_of_unknown_revisions: int = 0
    steps: int = 0
    steps_with_a_reload: int = 0
    median_step_ms: float = 0.0
    longest_step_ms: float = 0.0
    longest_step_with_a_reload_ms: float = 0.0
    longest_ratio: float = 0.0
    longest_ratio_with_a_reload: float = 0.0
    longest_without_its_reload_ms: float = 0.0
    made_long_by_a_reload: int = 0
    longest_call_ms: dict[str, float] = field(default_factory=dict)
    median_call_ms: dict[str, float] = field(default_factory=dict)


class Load:
    """Requests at a steady rate, whatever becomes of those before."""

    def __init__(self, base_url: str, rate: float) -> None:
        self._base_url = base_url
        self._rate = rate
        self.finished: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._base_url, timeout=120, limits=limits) as client:
            tasks = []
            begun = time.monotonic()
            for number in range(int(seconds * self._rate)):
                await asyncio.sleep(max(0.0, begun + number / self._rate - time.monotonic()))
                tasks.append(asyncio.create_task(self._ask(client, number)))
            await asyncio.gather(*tasks)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        request = {
            "model": "demo",
            "prompt": f"{PROMPT} {number % 100}",
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        try:
            answer = await client.post("/v1/completions", json=request)
            choices = answer.json()["choices"] if answer.status_code == 200 else []
            whole = choices and choices[0]["finish_reason"] in ("length", "content_filter")
            self.finished["whole" if whole else f"status {answer.status_code}"] += 1
        except httpx.HTTPError as error:
            self.finished[type(error).__name__] += 1


class Policies:
    """Replaces the policy file once a second; what it wrote, and which revisions they have."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._number = 0
        self.asked: Counter[str] = Counter()
        self.revisions: set[str] = set()
        self.write()

    def write(self) -> None:
        is_bad = self._number % BAD_EVERY == BAD_EVERY - 1
        text = BAD if is_bad else policy(self._number)
        if not is_bad:
            self.revisions.add(parse_policies(text).revision)
        if self._number:
            self.asked["failure" if is_bad else "success"] += 1
        self._number += 1
        beside = self._file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self._file)

    async def change(self, seconds: float, server: GuardedServer) -> None:
        """Once a second, but not before the one before was seen."""
        begun = time.monotonic()
        for number in range(1, int(seconds) + 1):
            await asyncio.sleep(max(0.0, begun + number - time.monotonic()))
            await asyncio.to_thread(self.wait_until_counted, server)
            await asyncio.to_thread(self.write)

    def wait_until_counted(self, server: GuardedServer) -> dict[str, int]:
        deadline = time.monotonic() + 10
        while sum((counted := reloads(server.metrics())).values()) < self.asked.total():
            if time.monotonic() > deadline:
                break
            time.sleep(LOOK_SECONDS / 4)
        return counted


def reloads(metrics: str) -> dict[str, int]:
    found = {"success": 0, "failure": 0}
    for line in metrics.splitlines():
        for result in found:
            if line.startswith("moe_guard_reloads_total{") and f'result="{result}"' in line:
                found[result] += int(float(line.rsplit(" ", 1)[1]))
    return found


def note_steps(outcome: Outcome, lines: Iterable[str]) -> None:
    steps = [json.loads(line) for line in lines]
    steps = steps[len(steps) // 20 :]  # the first ones fill caches
    plain = [step["seconds"] * 1e3 for step in steps if "reload" not in step]
    held = [step["seconds"] * 1e3 for step in steps if "reload" in step]
    outcome.steps, outcome.steps_with_a_reload = len(steps), len(held)
    outcome.median_step_ms = statistics.median(plain + held)
    outcome.longest_step_ms = max(plain)
    outcome.longest_step_with_a_reload_ms = max(held, default=0.0)
    outcome.longest_ratio = outcome.longest_step_ms / outcome.median_step_ms
    outcome.longest_ratio_with_a_reload = outcome.longest_step_with_a_reload_ms / outcome.median_step_ms
    twice = 2 * outcome.median_step_ms
    own = [1e3 * (s["seconds"] - sum(s["reload"].values())) for s in steps if "reload" in s]
    outcome.longest_without_its_reload_ms = max(own, default=0.0)
    outcome.made_long_by_a_reload = sum(
        whole > twice >= without for whole, without in zip(held, own, strict=True)
    )
    calls: dict[str, list[float]] = {}
    for step in steps:
        for name, seconds in step.get("reload", {}).items():
            calls.setdefault(name, []).append(seconds * 1e3)
    outcome.longest_call_ms = {name: max(each) for name, each in calls.items()}
    outcome.median_call_ms = {name: statistics.median(each) for name, each in calls.items()}


async def run(server: GuardedServer, policies: Policies, seconds: float, rate: float) -> Load:
    load = Load(server.base_url, rate)
    await load.run(2.0)  # every kind of step has been taken once
    load.finished.clear()
    await asyncio.gather(load.run(seconds), policies.change(seconds, server))
    return load


def measure(folder: Path, model: str, seconds: float, rate: float) -> Outcome:
    policy_folder = folder / "policies"
    policy_folder.mkdir()
    policies = Policies(policy_folder / "changing.yaml")
    log, steps = folder / "decisions.jsonl", folder / "steps.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServerSettings(
        model=model,
        policies=policy_folder,
        decision_log=log,
        vllm_args=(
            *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
            *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64"),
            *("--dtype", "float32"),
            *("--scheduler-cls", "benchmarks.step_clock.ClockedScheduler"),
            *("--additional-config", json.dumps({"moe_guard": {"reload_seconds": LOOK_SECONDS}})),
        ),
    )
    paths = [str(CHECKOUT), str(CHECKOUT / "integrations" / "vllm"), os.environ.get("PYTHONPATH", "")]
    environment = {
        VARIABLE: str(steps),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with (folder / "server.log").open("wb") as server_log:
        server = GuardedServer.start(settings, environment=environment, log=server_log)
        try:
            server.wait_until_guarded()
            load = asyncio.run(run(server, policies, seconds, rate))
            counted = policies.wait_until_counted(server)
        finally:
            server.stop()
    whole = load.finished["whole"]
    outcome = Outcome(
        seconds, load.finished.total(), load.finished.total() - whole, counted, dict(policies.asked)
    )
    decided = Counter(json.loads(line)["revision"] for line in log.read_text().splitlines())
    outcome.decisions, outcome.revisions_decided = decided.total(), len(decided)
    outcome.decisions_of_unknown_revisions = sum(
        count for revision, count in decided.items() if revision not in policies.revisions
    )
    note_steps(outcome, steps.read_text().splitlines())
    return outcome


def show(outcome: Outcome, console: Console) -> None:
    unknown = outcome.decisions_of_unknown_revisions
    lines = [
        f"requests         {outcome.requests}, lost {outcome.lost}",
        f"reloads          asked {outcome.asked}, counted {outcome.reloads}",
        f"decisions        {outcome.decisions} of {outcome.revisions_decided} revisions, "
        f"{unknown} of one that was never good",
        f"steps            {outcome.steps}, median {outcome.median_step_ms:.2f} ms",
        f"  longest        {outcome.longest_step_ms:.2f} ms, {outcome.longest_ratio:.2f} of the median",
        f"  with a reload  {outcome.steps_with_a_reload}, longest "
        f"{outcome.longest_step_with_a_reload_ms:.2f} ms, "
        f"{outcome.longest_ratio_with_a_reload:.2f} of the median; without its reload at most "
        f"{outcome.longest_without_its_reload_ms:.2f} ms",
        f"  longer than twice the median because of a reload: {outcome.made_long_by_a_reload}",
    ]
    lines += [
        f"  {name}: median {outcome.median_call_ms[name]:.2f} ms, longest {longest:.2f} ms"
        for name, longest in outcome.longest_call_ms.items()
    ]
    console.print("\n".join(lines), highlight=False, markup=False)


def faults_of(outcome: Outcome) -> list[str]:
    """What this run was to show and did not."""
    faults = {
        "requests were lost": outcome.lost > 0,
        "not every reload was counted as what it was": outcome.reloads != outcome.asked,
        "a decision names a revision that was never good": outcome.decisions_of_unknown_revisions > 0,
        "a reload made a step longer than twice the median": outcome.made_long_by_a_reload > 0,
    }
    return [fault for fault, is_one in faults.items() if is_one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--model", default=str(CHECKOUT / "demo" / "model"))
    parser.add_argument("--keep", type=Path, help="a folder for logs, which is made")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        outcome = measure(folder, arguments.model, arguments.seconds, arguments.rate)
    show(outcome, console)
    if arguments.out is not None:
        record: dict[str, Any] = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **asdict(outcome),
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    faults = faults_of(outcome)
    for fault in faults:
        console.print(f"[red]{fault}[/red]")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
