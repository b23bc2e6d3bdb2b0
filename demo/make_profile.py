"""Makes the demo model's profile with the product's own commands: `python -m demo.make_profile`.

Writes `policies/profiles/demo.json`, and beside the traces in `.cache/demo-profile` the report on it.
Sets, probe, baselines and thresholds come from the choosing split; what they are worth is shown on the
held-out one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from demo.names import Split
from demo.profile_prompts import (
    CHOOSE,
    HELD_OUT,
    prompt_lines,
    task_lines,
    text_lines,
    write_lines,
)
from guard.cli.demonstration.session import ENVIRONMENT
from guard.cli.documents import read_document, write_profile

HERE: Final = Path(__file__).parent
MODEL: Final = HERE / "model"
PROFILE: Final = HERE.parent / "policies" / "profiles" / "demo.json"
WORK: Final = HERE.parent / ".cache" / "demo-profile"
SEED: Final = 20261130
LICENCE: Final = "Apache-2.0"

LEAST_EXPECTED: Final = 0.05
"""Selections a token over benign traffic. Experts above it stand in for a safety set, which a model of
this size does not have."""

TOP: Final = 24
"""Of 64 experts. 10 of thousands are a strict demand; of 64 they would be taken up by those that the
restricted topic uses less."""

SALIENCY_PROMPTS: Final = 60
"""They run one by one."""

VLLM: Final = json.dumps({"enforce_eager": True, "max_model_len": 512})

Condition = Mapping[str, Any]

LIBRARY: Final[Sequence[Condition]] = (
    {"phase": "output", "when": {"rate": {"experts": "restricted", "over": 32, "minTokens": 16}}},
    {"phase": "prompt", "when": {"mass": {"experts": "restricted", "over": 16}}},
    {"phase": "output", "when": {"mass": {"experts": "restricted", "over": 32, "minTokens": 16}}},
    {"phase": "any", "when": {"mass": {"experts": "restricted", "over": "request", "minTokens": 32}}},
    {"phase": "any", "when": {"coactivation": {"experts": "restricted", "layers": 3, "over": 16}}},
    {"phase": "any", "when": {"dormant": {"baselineBelow": 0.01, "over": 32}}},
    {"phase": "output", "when": {"suppressed": {"experts": "safety", "over": 32, "minTokens": 16}}},
    {"phase": "any", "when": {"divergence": {"reduce": "max", "over": "request", "minTokens": 32}}},
    {"phase": "any", "when": {"divergence": {"reduce": "mean", "over": "request", "minTokens": 32}}},
    {"phase": "output", "when": {"entropy": {"over": 32, "minTokens": 32}}},
    {"phase": "output", "when": {"concentration": {"over": 32, "minTokens": 32}}},
    {"phase": "prompt", "when": {"mass": {"experts": "restricted", "over": 8}}},
    {"phase": "prompt", "when": {"probe": {"name": "restricted", "over": "prompt", "minTokens": 8}}},
    {"phase": "output", "when": {"probe": {"name": "restricted", "over": 32, "minTokens": 16}}},
)
"""Of the policy library and of the demo's own policies."""

PYTHON: Final[Sequence[Condition]] = (
    {"phase": "any", "when": {"mass": {"experts": "python", "over": 16}}},
)


def moe_guard(*arguments: object, fails: int = 0) -> None:
    """fails: an exit code that is an outcome, not a failure."""
    command = [str(Path(sys.executable).with_name("moe-guard")), *map(str, arguments)]
    code = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode
    if code not in (0, fails):
        raise SystemExit(f"moe-guard {arguments[0]} ended with {code}")


def write_inputs(work: Path) -> None:
    choose = prompt_lines(Split.CHOOSE, CHOOSE, SEED)
    write_lines(work / "choose.jsonl", choose)
    write_lines(work / "some.jsonl", choose[:: len(choose) // SALIENCY_PROMPTS])
    write_lines(work / "held-out.jsonl", prompt_lines(Split.HELD_OUT, HELD_OUT, SEED))
    write_lines(work / "texts.jsonl", text_lines(Split.HELD_OUT, SEED))
    write_lines(work / "tasks.jsonl", task_lines(SEED))
    for name, conditions in (("library", LIBRARY), ("python", PYTHON)):
        (work / f"{name}.json").write_text(json.dumps(conditions), encoding="utf-8")


def record(work: Path, model: Path) -> None:
    for name in ("choose", "held-out"):
        trace = work / f"{name}.moetrace"
        trace.unlink(missing_ok=True)
        prompts = work / f"{name}.jsonl"
        moe_guard(
            "record",
            model,
            *("--prompts", prompts),
            *("--out", trace),
            *("--max-tokens", 64),
            "--tokens",
            *("--vllm", VLLM),
        )


def add_expected(profile: Path) -> None:
    """The set `safety`: what benign traffic lives on."""
    known = read_document(profile)
    rates = known["baselines"]["rates"]
    known["sets"]["safety"] = [
        {"layer": int(layer), "experts": [e for e, rate in enumerate(row) if rate >= LEAST_EXPECTED]}
        for layer, row in rates.items()
    ]
    write_profile(profile, known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=PROFILE)
    parser.add_argument("--keep-traces", action="store_true", help="of the run before")
    options = parser.parse_args()
    work, model, profile = WORK, options.model, options.out
    work.mkdir(parents=True, exist_ok=True)
    console = Console()

    write_inputs(work)
    if not options.keep_traces:
        record(work, model)
    trace, fresh = work / "choose.moetrace", work / "held-out.moetrace"
    profile.unlink(missing_ok=True)

    console.rule("discover")
    target = ("--target", "restricted", "--phase", "any", "--top", TOP, "--licence", LICENCE)
    moe_guard("discover", trace, *target, "--profile", profile, "--out", work / "found.json")
    code = ("--target", "yes", "--reference", "no", "--label", "python", "--unpaired", "--phase", "any")
    moe_guard("discover", trace, *code, "--profile", profile, "--set", "python")
    add_expected(profile)
    moe_guard("saliency", model, "--prompts", work / "some.jsonl", "--profile", profile)

    console.rule("calibrate")
    for name, label, reference, found in (
        ("library", "label", "benign", "restricted"),
        ("python", "python", "no", "yes"),
    ):
        moe_guard(
            "calibrate",
            trace,
            *("--profile", profile, "--out", profile),
            *("--conditions", work / f"{name}.json"),
            *("--label", label, "--reference", reference, "--target", found),
            *("--budget", 0.01, "--budget", 0.05),
            *("--held-out-trace", fresh),
            *("--prompts", work / "choose.jsonl", "--held-out-prompts", work / "held-out.jsonl"),
            *("--report", work / f"thresholds-{name}.json"),
        )

    console.rule("causal")
    moe_guard(
        "causal",
        model,
        *("--profile", profile, "--set", "restricted"),
        *("--trace", trace, "--texts", work / "texts.jsonl", "--tasks", work / "tasks.jsonl"),
        *("--target", "restricted", "--report", work / "causal.json", "--vllm", VLLM),
        fails=2,
    )
    documents = ("found", "thresholds-library", "causal")
    moe_guard("report", *(work / f"{name}.json" for name in documents), "--out", work / "report.html")


if __name__ == "__main__":
    main()
