"""Sends the workload to a server, all at once or one by one, and keeps what each request got."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
from numpy.typing import NDArray

from tests.integration.server.conftest import Server
from tests.integration.workload.requests import WorkRequest

CONCURRENCY = 24


@dataclass
class Answer:
    """What a request got. routed_experts: [positions, layers, top_k], where vLLM keeps a record."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: str | None
    routed_experts: NDArray[np.int64] | None = None
    decisions: list[tuple[Any, ...]] = field(default_factory=list)


def run_together(server: Server, requests: list[WorkRequest]) -> dict[int, Answer]:
    """All of them, many at a time; a cancelled one has no answer."""
    return asyncio.run(_run(server, requests, CONCURRENCY))


def run_alone(server: Server, requests: list[WorkRequest]) -> dict[int, Answer]:
    """One after another, each on an empty prefix cache."""
    answers: dict[int, Answer] = {}
    for request in requests:
        httpx.post(f"{server.address}/reset_prefix_cache").raise_for_status()
        answers |= asyncio.run(_run(server, [request], 1))
    return answers


async def _run(server: Server, requests: list[WorkRequest], at_once: int) -> dict[int, Answer]:
    turn = asyncio.Semaphore(at_once)
    base_url = f"{server.address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def send(request: WorkRequest) -> Answer | None:
            async with turn:
                if request.is_cancelled:
                    await _send_and_leave(client, request)
                    return None
                reply: Any = await client.completions.create(**request.body())
            [choice] = reply.choices
            return Answer(choice.token_ids, choice.finish_reason, choice.stop_reason, _record(choice))

        replies = await asyncio.gather(*(send(request) for request in requests))
    return {
        request.number: answer
        for request, answer in zip(requests, replies, strict=True)
        if answer is not None
    }


async def _send_and_leave(client: openai.AsyncOpenAI, request: WorkRequest) -> None:
    """A client that goes away: at once, or after some tokens."""
    stream: Any = await client.completions.create(**request.body(), stream=True)
    tokens = request.number // 10 % 4
    async for _ in stream:
        tokens -= 1
        if tokens <= 0:
            break
    await stream.close()


def _record(choice: Any) -> NDArray[np.int64] | None:
    encoded = getattr(choice, "routed_experts", None)
    if encoded is None:
        return None
    record: NDArray[np.int64] = np.load(io.BytesIO(base64.b64decode(encoded))).astype(np.int64)
    return record


def decisions_since(server: Server, first_line: int) -> dict[int, list[tuple[Any, ...]]]:
    """By request number, what the log says of it from a line on, without ids and times."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for line in server.decision_log.read_text().splitlines()[first_line:]:
        row = json.loads(line)
        number = int(row["request_id"].split("work-")[1].split("-")[0])
        facts = tuple(row[key] for key in ("policy", "rule", "mode", "phase", "position", "outcome"))
        evidence = tuple(
            (item["condition"], item["value"], item["threshold"]) for item in row["evidence"]
        )
        found.setdefault(number, []).append((*facts, evidence, row["unseen_tokens"]))
    return {number: sorted(rows, key=repr) for number, rows in found.items()}


def log_length(server: Server) -> int:
    return len(server.decision_log.read_text().splitlines()) if server.decision_log.exists() else 0
