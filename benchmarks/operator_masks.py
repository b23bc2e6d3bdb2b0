"""How long an operator's mask takes under load, until every rank has it.

    .venv/bin/python -m benchmarks.operator_masks [--changes 100] [--concurrency 8] [--out FILE.json]

Starts `moe-guard serve demo/model`, compiled, keeps a mixed load going, and masks and unmasks an expert
over the admin API, again and again. Seconds are the operator's: from the request to the answer, which
comes when the mask is in force.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from rich.console import Console

from benchmarks.machine import machine
from guard.cli.demonstration.assets import find_assets
from guard.cli.server import GuardedServer, ServerSettings
from tools.mixed_load import TENANT_HEADER, MixedLoad
from tools.mixed_policies import write_policies

KEY: Final = "key-of-the-benchmark"
MASK: Final = {"experts": ["L2/E5"], "reason": "benchmark", "duration": "1h"}
AIM_S: Final = 1.0


def settings(folder: Path) -> ServerSettings:
    keys = folder / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: benchmark, role: admin}}\n")
    keys.chmod(0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ServerSettings(
        model=str(find_assets().model),
        policies=write_policies(folder / "policies"),
        decision_log=folder / "decisions.jsonl",
        label_headers={"tenant": TENANT_HEADER},
        admin_keys=keys,
        state_dir=folder / "state",
        vllm_args=(
            *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)),
            *("--max-model-len", "512", "--max-num-seqs", "16", "--dtype", "float32"),
        ),
    )


def change(address: str, times: int) -> dict[str, list[float]]:
    """Seconds of each change, of masking and of lifting the mask."""
    seconds: dict[str, list[float]] = {"mask": [], "unmask": []}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{address}/guard/v1", headers=headers, timeout=60) as client:
        for _ in range(times):
            made, took_s = _send(client, "POST", "/masks", MASK)
            seconds["mask"].append(took_s)
            _, took_s = _send(client, "DELETE", f"/masks/{made['mask']['id']}")
            seconds["unmask"].append(took_s)
    return seconds


def _send(
    client: httpx.Client, method: str, path: str, body: object = None
) -> tuple[dict[str, Any], float]:
    """The answer, and how long it took; where changes come too fast for the server, it waits first."""
    while True:
        begun = time.perf_counter()
        answer = client.request(method, path, json=body)
        took_s = time.perf_counter() - begun
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            found: dict[str, Any] = answer.raise_for_status().json()
            return found, took_s
        time.sleep(float(answer.headers["Retry-After"]))


def measure(folder: Path, times: int, concurrency: int) -> dict[str, list[float]]:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "server.log").open("wb") as log:
        server = GuardedServer.start(settings(folder), environment=environment, log=log)
        try:
            server.wait_until_guarded()
            done = threading.Event()
            load = MixedLoad(f"{server.base_url}/v1", "demo", concurrency=concurrency)
            worker = threading.Thread(target=load.run, kwargs={"until": done.is_set})
            worker.start()
            try:
                change(server.base_url, 5)  # what is done once is done
                return change(server.base_url, times)
            finally:
                done.set()
                worker.join()
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changes", type=int, default=100, help="masks, each lifted again")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        seconds = measure(Path(temporary), given.changes, given.concurrency)
    console = Console(highlight=False)
    record: dict[str, Any] = {**machine(), "concurrency": given.concurrency, "changes": given.changes}
    for name, each in seconds.items():
        median, p99 = np.percentile(each, (50, 99))
        record[name] = {"median_s": float(median), "p99_s": float(p99), "longest_s": max(each)}
        console.print(
            f"{name:7} median {median:.3f} s, p99 {p99:.3f} s, longest {max(each):.3f} s "
            f"(aim: p99 below {AIM_S:g} s)"
        )
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
