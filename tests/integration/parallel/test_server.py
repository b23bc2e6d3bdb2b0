"""A server with two data-parallel engines behind two API servers, and the real client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.parallel.engines import RANKS
from tests.integration.server.conftest import Server

pytestmark = pytest.mark.vllm

ENGINES = tuple(str(rank) for rank in range(RANKS))


def complete(server: Server, engine: str, *policies: str, max_tokens: int = 8) -> Any:
    return server.client.completions.create(
        model="tiny",
        prompt="the quick brown fox",
        max_tokens=max_tokens,
        temperature=0,
        extra_headers={"X-data-parallel-rank": engine},
        extra_body={"vllm_xargs": {"moe_guard_enforce": list(policies)}, "ignore_eos": True},
    )


def finished(server: Server, engine: str) -> float:
    return server.metric("moe_guard_requests_total", engine=engine)


def test_every_engine_shows_its_guard_and_is_up(server: Server) -> None:
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    up = [line for line in lines if line.startswith("moe_guard_up{")]
    assert len(up) == RANKS
    assert [server.metric("moe_guard_up", engine=engine) for engine in ENGINES] == [1.0] * RANKS
    assert server.log.read_text(errors="replace").count("Started server process") == RANKS


@pytest.mark.parametrize("engine", ENGINES)
def test_a_request_is_judged_counted_and_logged_by_the_engine_that_ran_it(
    server: Server, engine: str
) -> None:
    idle = ENGINES[1 - int(engine)]
    blocked = {"engine": engine, "outcome": "blocked"}
    before = server.metric("moe_guard_requests_total", **blocked)
    tokens = server.metric("moe_guard_tokens_evaluated_total", engine=idle)
    requests = finished(server, idle)

    reply = complete(server, engine, "stop-output")

    assert reply.choices[0].finish_reason == "content_filter"
    assert reply.usage.completion_tokens == 3
    server.wait_for(lambda: server.metric("moe_guard_requests_total", **blocked) == before + 1)
    server.wait_for(lambda: bool(server.decisions(reply.id)))
    fired = [d for d in server.decisions(reply.id) if d["policy"] == "stop-output"]
    assert [(d["position"], d["outcome"]) for d in fired] == [(fired[0]["position"], "blocked")]
    assert server.metric("moe_guard_tokens_evaluated_total", engine=idle) == tokens
    assert finished(server, idle) == requests


def test_engines_at_work_together_decide_what_each_decides_alone(server: Server) -> None:
    def ended(reply: Any) -> tuple[Any, ...]:
        choice = reply.choices[0]
        return choice.text, choice.finish_reason, choice.stop_reason

    asked = [
        (engine, policies, 4 + number)
        for number in range(6)
        for engine in ENGINES
        for policies in ((), ("stop-output",), ("reroute",), ("stop-prompt",))
    ]
    alone = [ended(complete(server, e, *p, max_tokens=n)) for e, p, n in asked[: len(ENGINES) * 4]]
    counted = [finished(server, engine) for engine in ENGINES]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda a: complete(server, a[0], *a[1], max_tokens=a[2]), asked))
    assert [ended(reply) for reply in together[: len(alone)]] == alone
    each = len(asked) // RANKS
    server.wait_for(lambda: [finished(server, e) for e in ENGINES] == [n + each for n in counted])
