"""`moe-guard record`: the routing of prompts, as a trace to replay policies over."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from guard.cli.output import err, fail
from guard.cli.vllm_process import run_job, vllm_arguments

RESERVED = ("prompt", "messages")


class Weights(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    NONE = "none"


def record(
    model: Annotated[str, typer.Argument(help="The model, as vLLM takes it.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help="JSON lines, each with `prompt` or `messages`; other fields are kept as labels."
        ),
    ],
    to: Annotated[Path, typer.Option("--out", help="The trace to write; it must not exist yet.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, at most.")] = 256,
    weights: Annotated[Weights, typer.Option(help="How to keep gate weights.")] = Weights.FLOAT32,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Keep token ids too. They are the text itself: keep the file like the prompts.",
        ),
    ] = False,
    vllm: Annotated[
        str, typer.Option("--vllm", help="Arguments of vllm.LLM, as a JSON object.")
    ] = "{}",
) -> None:
    """Run prompts through MODEL in vLLM, and record which experts each token is routed to."""
    if to.exists():
        fail(f"{to}: is there already; name another file")
    arguments = vllm_arguments(vllm)
    asked = read_prompts(prompts)
    job = {
        "model": model,
        "prompts": asked,
        "out": str(to.resolve()),
        "max_tokens": max_tokens,
        "weights": weights.value,
        "tokens": tokens,
        "vllm": arguments,
    }
    run_job("guard_vllm.record_offline", job)
    err.print(f"{to}: the routing of {len(asked)} prompts", soft_wrap=True, markup=False)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Each line's `prompt` or `messages`, and its other fields as `labels`. Exits at a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read: {error}")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            fail(f"{path}:{number}:{error.colno}: not JSON: {error.msg}")
        if not isinstance(one, dict) or len([key for key in RESERVED if key in one]) != 1:
            fail(f"{path}:{number}: a JSON object with either `prompt` or `messages`")
        if not isinstance(one.get("prompt", ""), str) or not isinstance(one.get("messages", []), list):
            fail(f"{path}:{number}: `prompt` is a text, `messages` a list")
        labels = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in one.items()
            if key not in RESERVED
        }
        found.append({**{key: one[key] for key in RESERVED if key in one}, "labels": labels})
    if not found:
        fail(f"{path}: holds no prompt")
    return found
