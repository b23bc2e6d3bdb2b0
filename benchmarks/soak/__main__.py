"""A guarded server under a mixed load for half an hour, with reloads, operators' changes and faults.

    .venv/bin/python -m benchmarks.soak [--minutes 30] [--faults TEXT | --without-guard] [--out NAME]

Starts `moe-guard serve demo/model` with two API servers, a decision log that rotates and an admin key;
sends the mixed load of `tools.mixed_load`, clients that hang up among them; replaces policies, every
fourth time by something bad, masks an expert and changes a mode now and then; and makes the guard fail
where --faults says (see docs/fail-modes.md). Then: does memory grow, was each request and decision told
once, does the log verify, do steps take as long at the end as at the beginning. `--out NAME` writes
`results/NAME.json` and a picture. `--without-guard` gives vLLM alone the same load: the
control of what its memory does by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.soak.disturb import Disturbances, changing
from benchmarks.soak.memory import Memory, slope_mib_per_minute
from benchmarks.soak.plot import draw
from benchmarks.step_clock import VARIABLE as STEP_CLOCK
from guard.cli.demonstration.assets import find_assets
from guard.cli.server import GuardedServer, ServerSettings
from tools.accounting import by_key, counted, logged, series
from tools.mixed_load import TENANT_HEADER, MixedLoad, Seen
from tools.mixed_policies import write_policies
from tools.prometheus import Prometheus, running
from tools.promql_check import RULES, check, dashboard_queries, rule_queries

CHECKOUT = Path(__file__).parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results"
KEY: Final = "key-of-the-soak"
WARM_UP_S: Final = 300.0
COMPARED_S: Final = 300.0
WINDOW_S: Final = 120.0
MAX_SLOPE_MIB_PER_MINUTE: Final = 0.2
LOG_MIB: Final = 1
SCRAPE_S: Final = 5
_TOLD_S: Final = 60.0
TIDY_MEMORY: Final = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""vLLM's worker keeps no products by their shapes (oneDNN's cache has up to 1,024), and glibc gives
back what is freed: both grow for long by themselves, and would hide what else does."""


@dataclass(kw_only=True)
class Control:
    """What came of a run.

    slopes: by process, MiB a minute behind the warm-up
    first, last: steps of the first minutes behind the warm-up and of the last
    p99_ms: of the steps of each `WINDOW_S`
    """

    minutes: float
    seen: dict[str, Any]
    slopes: dict[str, float] = field(default_factory=dict)
    p99_first_ms: float = math.nan
    p99_last_ms: float = math.nan
    median_first_ms: float = math.nan
    median_last_ms: float = math.nan
    p99_ms: list[float] = field(default_factory=list)
    rss_mib: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def warm_up_s(self) -> float:
        return min(WARM_UP_S, 60 * self.minutes / 3)


@dataclass(kw_only=True)
class Outcome(Control):
    """And of a guarded one.

    queries: of all rules and dashboards; silent_queries: those that gave nothing
    alerts: that fire at the end
    """

    outcomes: dict[str, int]
    decisions: int
    logged: int
    log_files: int
    dropped: int
    failures: dict[str, int]
    log_verifies: bool
    accounts_differ: list[str]
    made: dict[str, int] = field(default_factory=dict)
    queries: int = 0
    silent_queries: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """The folder of a run."""

    folder: Path

    @property
    def policies(self) -> Path:
        return self.folder / "policies"

    @property
    def log(self) -> Path:
        return self.folder / "decisions.jsonl"

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"

    def log_files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("decisions.jsonl*"), key=lambda file: file.stat().st_mtime)


@contextmanager
def serving(place: Place, faults: str) -> Iterator[GuardedServer]:
    write_policies(place.policies)
    (place.policies / "changing.yaml").write_text(changing(0))
    keys = place.folder / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: soak, role: admin}}\n")
    keys.chmod(0o600)
    settings = replace(
        vllm_alone(),
        policies=place.policies,
        decision_log=place.log,
        decision_log_max_mib=LOG_MIB,
        decision_log_keep=999,
        label_headers={"tenant": TENANT_HEADER},
        admin_keys=keys,
        state_dir=place.folder / "state",
    )
    drill = {"MOE_GUARD_INJECT_FAULTS": faults, "MOE_GUARD_ALLOW_INJECTED_FAULTS": "1"}
    with started(place, settings, drill if faults else {}) as server:
        server.wait_until_guarded()
        yield server


def vllm_alone() -> ServerSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ServerSettings(
        model=str(find_assets().model),
        policies=None,
        vllm_args=(
            *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
            *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"),
            *("--dtype", "float32", "--api-server-count", "2"),
            *("--scheduler-cls", "benchmarks.step_clock.ClockedScheduler"),
        ),
    )


@contextmanager
def started(
    place: Place, settings: ServerSettings, environment: Mapping[str, str]
) -> Iterator[GuardedServer]:
    paths = [str(CHECKOUT), str(CHECKOUT / "integrations" / "vllm"), os.environ.get("PYTHONPATH", "")]
    variables = {
        STEP_CLOCK: str(place.steps),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **{name: os.environ.get(name, value) for name, value in TIDY_MEMORY.items()},
        **environment,
    }
    with (place.folder / "server.log").open("wb") as log:
        server = GuardedServer.start(settings, environment=variables, log=log)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def watching(place: Place, server: GuardedServer) -> Iterator[str]:
    """A Prometheus with the shipped rules, by its base URL."""
    folder = place.folder / "prometheus"
    folder.mkdir()
    target = server.base_url.removeprefix("http://")
    with running(folder, [target], RULES.read_text("utf-8"), scrape_s=SCRAPE_S) as base_url:
        yield base_url


def alerts(base_url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Prometheus(base_url).get("alerts", {})["alerts"]
    return [alert for alert in found if alert["state"] == "firing"]


def measure(place: Place, minutes: float, faults: str) -> Outcome:
    done = threading.Event()
    with serving(place, faults) as server:
        disturbances = Disturbances(server.base_url, KEY, place.policies)
        memory = Memory()
        workers = [
            threading.Thread(target=disturbances.run, args=(done,)),
            threading.Thread(target=memory.watch, args=(done,)),
        ]
        for worker in workers:
            worker.start()
        with watching(place, server) as prometheus:
            ends = time.monotonic() + 60 * minutes
            load = MixedLoad(f"{server.base_url}/v1", "demo")
            seen = load.run(until=lambda: time.monotonic() >= ends)
            queries = [*rule_queries(), *dashboard_queries()]
            found = check(prometheus, queries)  # at once: rates look back a minute
            done.set()
            for worker in workers:
                worker.join()
            outcome = account(server.base_url, place, seen, minutes)
            outcome.queries, outcome.silent_queries = len(queries), [*found.broken, *found.empty]
            outcome.alerts = sorted({alert["labels"]["alertname"] for alert in alerts(prometheus)})
    outcome.made = dict(disturbances.made)
    note_memory(outcome, memory)
    note_steps(outcome, place.steps)
    return outcome


def control(place: Place, minutes: float) -> Control:
    """The same load on vLLM alone."""
    done = threading.Event()
    with started(place, vllm_alone(), {}) as server:
        server.wait_until_healthy()
        memory = Memory()
        watcher = threading.Thread(target=memory.watch, args=(done,))
        watcher.start()
        ends = time.monotonic() + 60 * minutes
        seen = MixedLoad(f"{server.base_url}/v1", "demo").run(until=lambda: time.monotonic() >= ends)
        done.set()
        watcher.join()
    outcome = Control(minutes=minutes, seen=facts_of(seen))
    note_memory(outcome, memory)
    note_steps(outcome, place.steps)
    return outcome


def account(address: str, place: Place, seen: Seen, minutes: float) -> Outcome:
    """Once all that was asked for has been told, or a while has passed."""
    deadline = time.monotonic() + _TOLD_S
    while time.monotonic() < deadline:
        ended = series(address, "moe_guard_requests_total").total()
        lines = [line for file in place.log_files() for line in logged(file)]
        dropped = series(address, "moe_guard_events_dropped_total").total()
        if ended >= seen.engine_requests and len(lines) + dropped >= counted(address).total():
            break
        time.sleep(1)
    outcomes = series(address, "moe_guard_requests_total", "outcome")
    failures = series(address, "moe_guard_failures_total", "stage")
    differ = []
    if outcomes.total() != seen.engine_requests:
        differ.append(f"{seen.engine_requests} requests were sent, {outcomes.total()} counted")
    if len({line["decision_id"] for line in lines}) != len(lines):
        differ.append("a decision is in the log twice")
    more, fewer = by_key(lines) - counted(address), counted(address) - by_key(lines)
    if more.total() or fewer.total() > dropped:
        differ.append(f"log beyond counters: {dict(more)}, counters beyond log: {dict(fewer)}")
    return Outcome(
        minutes=minutes,
        seen=facts_of(seen),
        outcomes={name: count for (name,), count in outcomes.items()},
        decisions=counted(address).total(),
        logged=len(lines),
        log_files=len(place.log_files()),
        dropped=dropped,
        failures={name: count for (name,), count in (+failures).items()},
        log_verifies=verifies(place),
        accounts_differ=differ,
    )


def facts_of(seen: Seen) -> dict[str, Any]:
    return {
        "engine_requests": seen.engine_requests,
        "kinds": dict(seen.kinds),
        "endings": dict(seen.endings),
        "stops": dict(seen.stops),
        "errors": dict(seen.errors),
    }


def verifies(place: Place) -> bool:
    command = [sys.executable, "-c", "from guard.cli import main; main()", "log", "verify"]
    done = subprocess.run([*command, str(place.log)], capture_output=True, text=True, check=False)
    if done.returncode:
        Console(stderr=True).print(done.stdout + done.stderr, markup=False)
    return done.returncode == 0


def note_memory(outcome: Control, memory: Memory) -> None:
    outcome.rss_mib = memory.rss_mib
    outcome.slopes = {
        name: round(slope_mib_per_minute(samples, outcome.warm_up_s), 3)
        for name, samples in memory.rss_mib.items()
        if samples[-1][0] > 60 * outcome.minutes - 30  # short-lived helpers apart
    }


def note_steps(outcome: Control, file: Path) -> None:
    steps = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    first_at, last_at = steps[0]["at"] + outcome.warm_up_s, steps[-1]["at"]
    compared_s = min(COMPARED_S, (last_at - first_at) / 2)

    def of(since: float, until: float) -> tuple[float, float]:
        ms = [1e3 * step["seconds"] for step in steps if since <= step["at"] < until]
        median, p99 = np.percentile(ms, (50, 99))
        return float(median), float(p99)

    outcome.median_first_ms, outcome.p99_first_ms = of(first_at, first_at + compared_s)
    outcome.median_last_ms, outcome.p99_last_ms = of(last_at - compared_s, last_at)
    windows = range(int((last_at - steps[0]["at"]) // WINDOW_S))
    starts = [steps[0]["at"] + WINDOW_S * window for window in windows]
    outcome.p99_ms = [round(of(start, start + WINDOW_S)[1], 1) for start in starts]


def faults_of(outcome: Control) -> list[str]:
    """What this run was to show and did not."""
    growing = {n: s for n, s in outcome.slopes.items() if not s < MAX_SLOPE_MIB_PER_MINUTE}
    faults = {
        f"memory grows by MiB a minute: {growing}": bool(growing),
        f"requests ended in errors: {outcome.seen['errors']}": bool(outcome.seen["errors"]),
    }
    if isinstance(outcome, Outcome):
        faults |= {
            f"accounts differ: {outcome.accounts_differ}": bool(outcome.accounts_differ),
            "the decision log does not verify": not outcome.log_verifies,
        }
    return [fault for fault, is_one in faults.items() if is_one]


def show(outcome: Control, console: Console) -> None:
    lines = [
        f"minutes    {outcome.minutes:g}",
        f"requests   {outcome.seen['engine_requests']} sent",
        f"endings    {outcome.seen['endings']}",
        f"memory     MiB a minute behind the warm-up: {outcome.slopes}",
        f"steps      first minutes: median {outcome.median_first_ms:.2f} ms, p99 "
        f"{outcome.p99_first_ms:.2f}; last: {outcome.median_last_ms:.2f}, {outcome.p99_last_ms:.2f}",
        f"           p99 by {WINDOW_S / 60:g} minutes: {outcome.p99_ms}",
    ]
    if isinstance(outcome, Outcome):
        lines += [
            f"outcomes   {outcome.outcomes}",
            f"decisions  {outcome.decisions} counted, {outcome.logged} in {outcome.log_files} files of "
            f"the log, {outcome.dropped} dropped; the log verifies: {outcome.log_verifies}",
            f"made       {outcome.made}",
            f"failures   {outcome.failures}",
            f"queries    {outcome.queries}, of which gave nothing: {outcome.silent_queries}",
            f"alerts     {outcome.alerts}",
        ]
    console.print("\n".join(lines), highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--faults", default="", help="as MOE_GUARD_INJECT_FAULTS takes them")
    way.add_argument("--without-guard", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for logs, which is made")
    parser.add_argument("--out", help="name of a result")
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder)
        outcome: Control
        if given.without_guard:
            outcome = control(place, given.minutes)
        else:
            outcome = measure(place, given.minutes, given.faults)
    show(outcome, console)
    if given.out is not None:
        record = {**machine(), "faults": given.faults, **asdict(outcome)}
        (RESULTS / f"{given.out}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(outcome.rss_mib, outcome.slopes, RESULTS / f"{given.out}.png")
    faults = faults_of(outcome)
    for fault in faults:
        console.print(fault, style="red", markup=False)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
