"""Runs prompts against a server with the openai client, and finds the decisions about each."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.cli.demonstration.assets import Assets, Prompt
from guard.cli.server import GuardedServer, ServerSettings

MAX_TOKENS = 48
SERVED_NAME = "moe-guard-demo"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client got, and what the decision log says about it (empty: nothing fired)."""

    prompt: Prompt
    request_id: str
    text: str
    finish_reason: str
    stop_reason: str | None
    refusal: str | None
    decisions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """The most that was done: passed, observed, masked or blocked."""
        order = ("passed", "observed", "masked", "blocked")
        return max((d["outcome"] for d in self.decisions), key=order.index, default="passed")


def demo_settings(assets: Assets, decision_log: Path | None) -> ServerSettings:
    """The demo's server; with no decision log, the same server without a guard.

    Eager, because compiling takes longer than the whole demo; the guard needs no eager mode.
    """
    return ServerSettings(
        model=str(assets.model),
        policies=None if decision_log is None else assets.policies,
        decision_log=decision_log,
        vllm_args=(
            *("--served-model-name", SERVED_NAME),
            *("--host", "127.0.0.1", "--port", str(_free_port())),
            *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"),
        ),
    )


def start(assets: Assets, decision_log: Path | None, server_log: Path) -> GuardedServer:
    """Start the demo's server, guarded if there is a decision log, and wait until it serves.

    Raises GuardError, with the end of the server's own log.
    """
    settings = demo_settings(assets, decision_log)
    with server_log.open("wb") as log:
        server = GuardedServer.start(settings, environment=ENVIRONMENT, log=log)
    try:
        if decision_log is None:
            server.wait_until_healthy()
        else:
            server.wait_until_guarded()
    except BaseException:
        server.stop()
        raise
    return server


def ask_all(
    server: GuardedServer,
    prompts: Sequence[Prompt],
    decision_log: Path | None,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One chat request after the other, at temperature 0."""
    from openai import OpenAI  # takes a second; the rest of the command does without

    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
    answers = []
    for prompt in prompts:
        reply = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": prompt.text}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        choice = reply.choices[0]
        answers.append(
            Answer(
                prompt,
                reply.id,
                choice.message.content or "",
                choice.finish_reason,
                getattr(choice, "stop_reason", None),
                choice.message.refusal,
            )
        )
        on_answer()
    if decision_log is not None:
        _attach_decisions(answers, decision_log)
    return answers


def _attach_decisions(answers: list[Answer], decision_log: Path) -> None:
    time.sleep(1.0)  # the last decisions are still on their way to the disk
    by_request: dict[str, list[dict[str, Any]]] = {}
    for line in decision_log.read_text(encoding="utf-8").splitlines():
        decision = json.loads(line)
        by_request.setdefault(decision["request_id"], []).append(decision)
    for answer in answers:
        answer.decisions.extend(by_request.get(answer.request_id, []))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
