"""Which engines these tests start: a process for each group, one engine of it after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.offline import cases, policies
from tests.support.partners import wait_for_all
from tests.support.support_facts import Mode, Runner
from tests.support.thorough import IS_THOROUGH

_CHECKOUT = Path(__file__).parents[3]
_SUPPORT = _CHECKOUT / "tests" / "support"
_TIMEOUT_SECONDS = 600

_STAGE_FAULTS_ON = {"worker_extension_cls": "tests.support.stage_faults.StageFaults"}
_FAULTS_ON = {"worker_extension_cls": "tests.support.routing_faults.RoutingFaults"}

MODES = ("eager", "compiled", "v2")
"""Model Runner V1, the same compiled, and Model Runner V2."""

PLACES: dict[str, tuple[Runner, Mode]] = {
    "eager": ("v1", "eager"),
    "compiled": ("v1", "compiled"),
    "v2": ("v2", "eager"),
}
"""The `MODES` in the words of the support table."""

_ENFORCING = [
    cases.case("unmasked", cases.batch_of_16()),
    cases.case("masked", cases.batch_of_16(["isolate"])),
]
_PLAIN = [cases.case("unmasked", cases.batch_of_16())]
_PLAIN_MORE = [*_PLAIN, cases.mask_midway(), cases.blocks()]
_CACHED_AND_ALONE = [
    cases.PREFIX_IN_STEP,
    cases.alone(cases.PREFIX),
    cases.alone(cases.PREFIX_IN_STEP),
]
_ENFORCING_MORE = [
    *_ENFORCING,
    cases.mask_midway(["late"]),
    cases.blocks(["stop"]),
    cases.blocks(["stop-prompt"]) | {"name": "prompt-blocks"},
    cases.PREFIX,
    cases.PREFIX_MASKED_FIRST,
    cases.PREFIX_CLOSED,
    *_CACHED_AND_ALONE,
    cases.CROWD,
]


# Of the rank whose output reaches nobody: the second of two alike, and the first of a pipeline.
_FAULTS_OF_TP2 = cases.routing_faults_of_rank(1, cases.FAULT_LAYER)
_FAULTS_OF_PP2 = cases.routing_faults_of_rank(0, cases.FIRST_STAGE_FAULT_LAYER)

_TWO_RANKS = ("tp2", "v2-pp2")
RANKED_RECORDER = "tests.support.ranked_recorder.RankedRecorder"


@dataclass
class Engines:
    """Starts a group's process when a test first asks for it, and keeps its result.

    The groups are `MODE-plain` (no plugin is loaded), `MODE-guarded`, `starts`, `processes`, `kernel`
    (vLLM has no kernel but one that routes inside itself), and for two ranks `tp2` and `v2-pp2`.
    """

    folder: Path
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def result(self, group: str, engine: str) -> dict[str, Any]:
        """What `tests.support.engine_run` says of one engine."""
        if group not in self._results:
            self._results[group] = self._run(group)
        result: dict[str, Any] = self._results[group][engine]
        return result

    def case(self, group: str, engine: str, case: str) -> dict[str, Any]:
        result = self.result(group, engine)
        if "error" in result:
            pytest.fail(f"{group}/{engine} did not start:\n{result['error'][-4000:]}")
        found: dict[str, Any] = result["cases"][case]
        return found

    def log(self, group: str) -> str:
        """What a group's process wrote, of all its engines and ranks."""
        return (self.folder / f"{group}.log").read_text(encoding="utf-8")

    def traces(self, group: str) -> Path:
        """The folder that a group's `main` engine records into."""
        return self.folder / f"{group}-traces"

    def _run(self, group: str) -> dict[str, Any]:
        self._wait_for_all({group: self._start(group, self._engines(group))})
        return self._read(group)

    def _start(
        self,
        group: str,
        engines: list[dict[str, Any]],
        name: str = "",
        launcher: Sequence[str] = (),
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        """name: of the process, if not the group's; launcher: arguments of Python that start the
        script; environment: beside the group's own"""
        job, out, log = self._files(name or group)
        job.write_text(json.dumps({"engines": engines}))
        with log.open("w") as output:
            return subprocess.Popen(
                [sys.executable, *launcher, str(_SUPPORT / "engine_run.py"), str(job), str(out)],
                env=self._environment(group) | environment,
                cwd=self.folder,
                stdout=output,
                stderr=output,
            )

    def _wait_for_all(self, processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """By the names of their files."""
        wait_for_all(processes, _TIMEOUT_SECONDS, log_of=self._end_of_log, fault_of=self._start_error)

    def _start_error(self, name: str) -> str | None:
        errors = [result["error"] for result in self._read(name).values() if "error" in result]
        return errors[0][-4000:] if errors else None

    def _end_of_log(self, name: str) -> str:
        _, _, log = self._files(name)
        return log.read_text(errors="replace")[-8000:]

    def _read(self, name: str) -> dict[str, Any]:
        _, out, _ = self._files(name)
        results: dict[str, Any] = json.loads(out.read_text())
        return results

    def _files(self, name: str) -> tuple[Path, Path, Path]:
        job, out, log = (self.folder / f"{name}.{suffix}" for suffix in ("json", "out", "log"))
        return job, out, log

    def _environment(self, group: str) -> dict[str, str]:
        paths = [str(_CHECKOUT), str(_CHECKOUT / "integrations" / "vllm")]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_GUARD_", "VLLM_"))}
        env |= {
            "PYTHONFAULTHANDLER": "1",  # `wait_for_all` asks for stacks
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one thread each, see tests/conftest.py
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            # Engines of one process start in seconds; `processes` shows the same across processes.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if group == "processes" else "0",
        }
        if group.startswith("v2"):
            paths.insert(0, str(_SUPPORT / "v2_on_cpu"))
            env |= {"MOE_GUARD_TEST_V2": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        if group in _TWO_RANKS:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        if group.endswith("-plain"):
            env["VLLM_PLUGINS"] = ""
        return env | {"PYTHONPATH": os.pathsep.join(paths)}

    def _engines(self, group: str) -> list[dict[str, Any]]:
        mode, _, kind = group.partition("-")
        more = {"enforce_eager": mode != "compiled"}
        if group == "starts":
            return self._starts()
        if group == "tp2":
            cases_of_tp2 = [*_ENFORCING, cases.mask_midway(["late"]), cases.blocks(["stop"])]
            cases_of_tp2.append(self._reloads())
            two = {"tensor_parallel_size": 2, "worker_extension_cls": RANKED_RECORDER}
            return [
                self._engine("main", "main", cases_of_tp2, **two),
                self._engine("faulty", "main", [cases.FAULT_ON_RANK_1], **two),
                self._engine("faults", "faults", _FAULTS_OF_TP2, **two | _FAULTS_ON),
            ]
        if group == "v2-pp2":
            cases_of_pp2 = [*_ENFORCING, cases.mask_midway(["late"]), cases.blocks(["stop"])]
            two = {"pipeline_parallel_size": 2, "worker_extension_cls": RANKED_RECORDER}
            chunks = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}
            engines = [
                self._engine("main", "main", cases_of_pp2, **two),
                self._engine("chunked", "main", [cases.LONG_PROMPTS], **two, **chunks),
            ]
            if IS_THOROUGH:
                engines.append(self._engine("faults", "faults", _FAULTS_OF_PP2, **two | _FAULTS_ON))
            return engines
        if group == "kernel":
            return self._engines_of_a_kernel_that_routes()
        if group == "processes":
            return [self._engine("main", "main", _ENFORCING)]
        if kind == "faults":
            engines = [self._engine("faults", "faults", cases.routing_faults(), **more, **_FAULTS_ON)]
            if mode == "eager":
                engines.insert(0, self._stage_faults())
            return engines
        if kind == "plain":
            cases_of_mode = _PLAIN if mode == "compiled" else _PLAIN_MORE
            return [self._engine("plain", None, cases_of_mode, **more)]
        engines = [
            self._engine("off", None, _PLAIN, **more),
            self._engine("empty", "empty", _PLAIN, **more),
        ]
        if mode != "compiled":
            engines.append(self._engine("never", "never", _PLAIN, **more))
        main = _ENFORCING if mode == "compiled" else _ENFORCING_MORE
        if mode == "v2":
            main, more["enable_return_routed_experts"] = [*main, cases.LONG_PROMPTS], True
        if mode == "eager":
            main = [*main, cases.LONG_PROMPTS]
        recorded = self._engine("main", "main", main, **more) | {"load_seconds": 0.0}
        recorded["engine"]["additional_config"]["moe_guard"]["load_every"] = 1
        if mode != "compiled":
            section = recorded["engine"]["additional_config"]["moe_guard"]
            section["record"] = str(self.traces(group))
        engines.append(recorded)
        if mode == "eager":
            unseen = self._engine("unseen", "main", [cases.PREFIX, cases.PREFIX_CLOSED])
            unseen["engine"]["additional_config"]["moe_guard"]["prefix_evidence"] = False
            engines.append(unseen)
        if mode != "compiled":
            chunks = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}
            chunked = [cases.LONG_PROMPTS, cases.PREFIX, cases.PREFIX_IN_STEP]
            chunked_more = [*chunked, self._reloads(), cases.EVERY_CHUNK]
            engines.append(self._engine("chunked", "main", chunked_more, **chunks))
            odd = chunks | {"max_num_batched_tokens": 23}
            engines.append(self._engine("chunked-oddly", "main", chunked[1:], **odd))
            labelled = self._engine("labelled", "labelled", [cases.LABELLED], **more)
            engines.append(labelled | {"record": True})
            tight = {"num_gpu_blocks_override": cases.CROWDED_BLOCKS}
            engines.append(self._engine("crowded", "main", [cases.CROWD], **tight))
        return engines

    def _reloads(self) -> cases.Case:
        return cases.reloads(str(self.folder / "isolating"), str(self.folder / "main"))

    def _stage_faults(self) -> dict[str, Any]:
        """Behind the first engine of a process no decision log is opened."""
        engine = self._engine("stages", "faults", cases.stage_faults(), **_STAGE_FAULTS_ON)
        section = engine["engine"]["additional_config"]["moe_guard"]
        section["decision_log"] = str(self.folder / "stages.jsonl")
        return engine

    def _engines_of_a_kernel_that_routes(self) -> list[dict[str, Any]]:
        kernels = {"worker_extension_cls": "tests.support.routing_kernel.KernelRecorder"}
        main = [*_ENFORCING, cases.LONG_PROMPTS, *cases.KERNEL_FAULTS]
        engines = [
            self._engine("off", None, _PLAIN),
            self._engine("main", "main", main, **kernels),
            self._engine("compiled", "main", _ENFORCING, enforce_eager=False, **kernels),
            self._engine("drops", "faults", []),
            self._engine("deaf", "main", [], **kernels),
        ]
        kernel_of = {"deaf": "DeafKernel"}
        return [{"kernel": kernel_of.get(one["name"], "RoutingKernel")} | one for one in engines]

    def _starts(self) -> list[dict[str, Any]]:
        def start(name: str, section: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
            engine = self._engine(name, "main", [], **more)
            if section is not None:
                engine["engine"]["additional_config"] = {"moe_guard": section}
            return engine

        folder = str(self.folder / "main")
        starts = [
            start("dense", model=str(self.folder / "dense")),
            start("out-of-range", {"policies": str(self.folder / "range")}),
            start("missing", {"policies": str(self.folder / "nowhere")}),
            start("unknown-key", {"policies": folder, "observe_onyl": True}),
            start("drill", {"policies": folder, "inject_faults": "evaluate@3"}),
            start("prompt-embeds", enable_prompt_embeds=True),
            start("pipeline", pipeline_parallel_size=2),
        ]
        keys = [self._engine("key-off", None, []), self._engine("key-off-again", None, [])]
        keys += [self._engine(f"key-{name}", name, []) for name in ("empty", "main")]
        return starts + [key | {"config_only": True} for key in keys]

    def _engine(
        self, name: str, policy_folder: str | None, engine_cases: list[cases.Case], **more: Any
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": str(self.folder / "moe"),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": cases.BATCH,
            "block_size": cases.BLOCK_SIZE,
            "enable_prefix_caching": True,
        }
        if policy_folder is not None:
            section = {"policies": str(self.folder / policy_folder)}
            arguments["additional_config"] = {"moe_guard": section}
        return {
            "name": name,
            "engine": arguments | more,
            "cases": engine_cases,
            "record": policy_folder == "main",
        }


def write_inputs(folder: Path) -> None:
    """The policy folders that the engines name."""
    (folder / "empty").mkdir()
    (folder / "profile.json").write_text(json.dumps(policies.PROFILE), encoding="utf-8")
    policies.write(folder / "main", policies.MAIN)
    policies.write(folder / "isolating", policies.ISOLATING)
    policies.write(folder / "never", policies.NEVER_FIRES)
    policies.write(folder / "labelled", policies.LABELLED)
    policies.write(folder / "faults", policies.FAULTS)
    policies.write(folder / "range", policies.OUT_OF_RANGE)
