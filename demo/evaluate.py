"""Runs the committed policies on the held-out prompts and prints what fired: `python -m
demo.evaluate`.

The model answers unguarded, and the guard's own reference evaluator judges the recorded routing.
Whether anything fires, and what fires first, is the same under guard: until the first firing
nothing is masked.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.routing import MODEL_DIR, Recorder
from demo.text import Prompt
from guard.policy.load import load_policies
from guard.program.compile import compile_policies
from guard.program.reference import evaluate

HERE: Final = Path(__file__).parent


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file."""
    entries = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return [Prompt(entry["id"], entry["topic"], entry["prompt"]) for entry in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--policies", type=Path, default=HERE / "policies")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("files", nargs="*", default=["restricted", "benign", "code"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    recorder = Recorder(options.model, getattr(torch, options.dtype))
    policies = load_policies(options.policies)
    compile_policies(policies, recorder.topology)  # refuses what does not fit the model

    table = Table(
        "file",
        "topic",
        "prompts",
        *(f"{p.name}/{r.name}" for p, r in policies.ordered_rules()),
        "any",
    )
    for name in options.files:
        prompts = read_prompts(options.prompts / f"{name}.jsonl")
        fired: dict[str, Counter[str]] = {}
        runs = recorder.run_all([prompt.text for prompt in prompts])
        for prompt, run in zip(prompts, track(runs, name, len(prompts)), strict=True):
            verdict = evaluate(policies, recorder.topology, run.routing)
            rules = {f"{firing.policy}/{firing.rule}" for firing in verdict.firings}
            fired.setdefault(prompt.topic, Counter()).update(
                [*rules, "prompts", *(["any"] if rules else [])]
            )
            if bool(rules) is (prompt.topic != "restricted"):
                console.print(
                    f"[dim]{prompt.topic}: {prompt.text} -> {sorted(rules)} | {run.output}",
                    markup=True,
                )
        for topic, counts in fired.items():
            columns = [str(counts[f"{p.name}/{r.name}"]) for p, r in policies.ordered_rules()]
            table.add_row(name, topic, str(counts["prompts"]), *columns, str(counts["any"]))
    console.print(table)


if __name__ == "__main__":
    main()
