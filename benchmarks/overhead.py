"""What the guard costs: paired and interleaved runs on a 340 M-parameter MoE with random weights.

    .venv/bin/python -m benchmarks.overhead [--rounds 12] [--eager] [--out FILE.json]

All engines are up at once, each in its own processes, and take turns: in a round every state runs
the same batch once, in an order that is drawn anew. A state's ratio is its time over that of `no
plugin` in the same round; `no plugin again` is a second engine of the same kind, so its ratio shows
what this method cannot tell apart.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.table import Table

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64, 32
OBSERVING_POLICIES = 16


@dataclass(frozen=True)
class State:
    """A way to serve. policies: YAML, or None for a vLLM without the plugin."""

    name: str
    policies: str | None
    extra_args: dict[str, Any] = field(default_factory=dict)


def observing(number: int) -> str:
    first = number * 4 % 60
    return f"""\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: observe-{number}}}
spec:
  mode: enforce
  experts: {{flagged: [{{layers: 0-11, experts: [{first}-{first + 3}]}}]}}
  rules:
    - name: burst
      match: {{phase: output}}
      when: {{rate: {{experts: flagged, over: 16, above: 0.95}}}}
    - name: share
      when: {{mass: {{experts: flagged, over: request, minTokens: 16, above: 0.95}}}}
"""


MASKING = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: reroute}
spec:
  mode: audit
  experts: {flagged: [{layers: 0-11, experts: [0-7]}]}
  rules:
    - name: always
      when: always
      then: {mask: {experts: flagged}}
"""

STATES = (
    State("no plugin", None),
    State("no plugin again (A/A)", None),
    State("armed, no policies", ""),
    State(
        f"observing, {OBSERVING_POLICIES} policies",
        "---\n".join(map(observing, range(OBSERVING_POLICIES))),
    ),
    State("masking half the requests", MASKING, {"moe_guard_enforce": ["reroute"]}),
)


class Engine:
    def __init__(self, state: State, folder: Path, *, eager: bool) -> None:
        self.state = state
        folder.mkdir()
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        additional_config: dict[str, Any] = {}
        if state.policies is None:
            environment["VLLM_PLUGINS"] = ""
        else:
            (folder / "policies").mkdir()
            if state.policies:
                (folder / "policies" / "all.yaml").write_text(state.policies)
            additional_config = {"moe_guard": {"policies": str(folder / "policies")}}
        read_fd, write_fd = os.pipe()
        job = {
            "model": str(folder.parent / "model"),
            "eager": eager,
            "requests": REQUESTS,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "additional_config": additional_config,
            "extra_args": state.extra_args or None,
            "answers_fd": write_fd,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine_process", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=(folder / "engine.log").open("wb"),
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[write_fd],
            text=True,
        )
        os.close(write_fd)
        self._answers: IO[str] = os.fdopen(read_fd)
        self._log = folder / "engine.log"
        self._answer()

    def run(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{self.state.name}: {self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(rounds: int, *, eager: bool, console: Console) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {state.name: [] for state in STATES}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        engines = []
        for number, state in enumerate(STATES):
            console.print(f"starting: {state.name}")
            engines.append(Engine(state, Path(scratch, f"engine{number}"), eager=eager))
        for engine in engines:
            engine.run()  # warm
        order = random.Random(0)
        for number in range(rounds):
            for engine in order.sample(engines, len(engines)):
                results[engine.state.name].append(engine.run())
            console.print(f"round {number + 1} of {rounds}")
        for engine in engines:
            engine.close()
    return results


def summary(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Median of the paired ratios, with a 95 % bootstrap interval of that median."""
    base = np.array([run["seconds"] for run in results[STATES[0].name]])
    rng = np.random.default_rng(0)
    rows = []
    for name, runs in results.items():
        seconds = np.array([run["seconds"] for run in runs])
        ratios = seconds / base
        resampled = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        rows.append(
            {
                "state": name,
                "tokens_per_second": float(np.median([r["tokens"] / r["seconds"] for r in runs])),
                "time_ratio": float(np.median(ratios)),
                "low": float(low),
                "high": float(high),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(highlight=False)
    results = measure(options.rounds, eager=options.eager, console=console)
    rows = summary(results)
    table = Table("state", "tokens/s", "time ratio", "95 % interval")
    for row in rows:
        table.add_row(
            row["state"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['time_ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
        )
    console.print(table)
    if options.out:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                name: importlib.metadata.version(name) for name in ("moe-guard", "vllm", "torch")
            },
            "compiled": not options.eager,
            "workload": {
                "requests": REQUESTS,
                "prompt_tokens": PROMPT_TOKENS,
                "output_tokens": OUTPUT_TOKENS,
                "rounds": options.rounds,
            },
            "states": [asdict(state) for state in STATES],
            "summary": rows,
            "runs": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
