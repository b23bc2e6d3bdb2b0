"""Two engines that route each other's rows, each with requests of its own; and the same one by one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from tests.integration.offline import cases
from tests.integration.offline.engines import Engines
from tests.support.ports import free_port

RANKS = 2
_PORTS_OF_A_PAIR = 16
SHIM = Path(__file__).parents[2] / "support" / "parallel_on_cpu"

_BATCH = cases.batch_of_16(["isolate"])
_LONGER = [
    [cases.request(cases.tokens(600 + i, 40), max_tokens=30, enforce=["isolate"])]
    for i in range(len(cases.BLOCK_VARIANTS))
]

CASES = [
    # Batches of other sizes on each rank, with masked requests among both.
    [cases.case("masked", _BATCH[:5]), cases.case("masked", _BATCH[5:])],
    # A mask comes on in the middle, beside an engine that has nothing to do.
    [cases.mask_midway(["late"]), cases.case("midway", [], [], [])],
    # A request is blocked, so that its engine falls idle while the other goes on.
    [cases.blocks(["stop"]), cases.case("blocks", *_LONGER)],
]
"""By case, what each rank runs: as many batches, for they step together."""


class EnginePairs(Engines):
    """The groups are `eager-guarded`, `eager-plain` and `v2-guarded`, of engines `rank0` and `rank1`
    side by side, the same with `-experts` behind it, where each has half of the experts, and
    `eager-alone`, where each engine runs its cases by itself. In `tensor-experts` two tensor-parallel
    ranks have half of the experts each, and the engine is `main`; in `launched` two ranks, each with an
    engine core of its own, are started by torchrun."""

    def _run(self, group: str) -> dict[str, Any]:
        if group in ("eager-alone", "tensor-experts"):
            return super()._run(group)
        if group == "launched":
            return self._run_launched(free_port())
        port = free_port(in_a_row=_PORTS_OF_A_PAIR)
        processes = {
            f"{group}-rank{rank}": self._start_rank(group, rank, port) for rank in range(RANKS)
        }
        self._wait_for_all(processes)
        return {f"rank{rank}": self._read(f"{group}-rank{rank}")["main"] for rank in range(RANKS)}

    def _run_launched(self, port: int) -> dict[str, Any]:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", f"--master-port={port}"]
        process = self._start("launched", self._engines("launched"), "launched-$RANK", launcher)
        self._wait_for_all({"launched-$RANK": process})
        return {f"rank{rank}": self._read(f"launched-{rank}")["main"] for rank in range(RANKS)}

    def _start_rank(self, group: str, rank: int, port: int) -> subprocess.Popen[bytes]:
        return self._start(
            group,
            [self._rank(group, rank)],
            f"{group}-rank{rank}",
            VLLM_DP_RANK=str(rank),
            VLLM_DP_SIZE=str(RANKS),
            VLLM_DP_MASTER_IP="127.0.0.1",
            VLLM_DP_MASTER_PORT=str(port),
        )

    def _rank(self, group: str, rank: int) -> dict[str, Any]:
        policies = None if "-plain" in group else "main"
        more = {"enable_return_routed_experts": True} if group.startswith("v2") else {}
        if group.endswith("-experts"):
            more["enable_expert_parallel"] = True
        its_cases = CASES if group in ("eager-guarded", "eager-alone") else CASES[:1]
        return self._engine("main", policies, [ranks[rank] for ranks in its_cases], **more)

    def _engines(self, group: str) -> list[dict[str, Any]]:
        if group in ("tensor-experts", "launched"):
            two: dict[str, Any] = {"tensor_parallel_size": RANKS, "enable_expert_parallel": True}
            if group == "launched":
                two = {
                    "tensor_parallel_size": RANKS,
                    "distributed_executor_backend": "external_launcher",
                    "seed": 0,
                }
            return [self._engine("main", "main", [cases.case("masked", _BATCH)], **two)]
        return [self._rank(group, rank) | {"name": f"rank{rank}"} for rank in range(RANKS)]

    def _environment(self, group: str) -> dict[str, str]:
        environment = super()._environment(group)
        environment["PYTHONPATH"] += os.pathsep + str(SHIM)
        if group != "eager-alone":
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join("01"[:RANKS])
        environment["VLLM_PLUGINS"] = (
            "parallel_on_cpu" if "-plain" in group else "parallel_on_cpu,moe_guard"
        )
        return environment
