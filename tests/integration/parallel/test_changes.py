"""Policies and operators' masks that change while two data-parallel engines serve."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.integration.parallel.test_server import ENGINES, complete
from tests.integration.server.conftest import ADMIN_KEY, POLICIES, Server

pytestmark = pytest.mark.vllm

MASK = {"experts": ["L0/E3"], "reason": "a test"}
OF_NOBODY = MASK | {"experts": ["L1/E2"], "labels": {"tenant": "nobody"}}
ASKED = [
    (engine, policies, 8 + number)
    for number in range(6)
    for engine in ENGINES
    for policies in ((), ("stop-output",), ("reroute",))
]


def admin(server: Server, method: str, path: str, body: object = None) -> Any:
    """A connection of its own, so that it may come to either API server."""
    answer = httpx.request(
        method,
        f"{server.address}/guard/v1{path}",
        json=body,
        headers={"Authorization": f"Bearer {ADMIN_KEY}"},
        timeout=120,
    )
    answer.raise_for_status()
    return answer.json()


@contextmanager
def masked(server: Server, body: dict[str, Any]) -> Iterator[str]:
    made = admin(server, "POST", "/masks", body)
    yield made["revision"]
    admin(server, "DELETE", f"/masks/{made['mask']['id']}?reason=done")


def ended(reply: Any) -> tuple[Any, ...]:
    choice = reply.choices[0]
    return choice.text, choice.finish_reason, choice.stop_reason


def ask(server: Server, asked: tuple[str, tuple[str, ...], int]) -> tuple[Any, ...]:
    engine, policies, max_tokens = asked
    return ended(complete(server, engine, *policies, max_tokens=max_tokens))


def of_each(server: Server, name: str, **labels: str) -> list[float]:
    return [server.metric(name, engine=engine, **labels) for engine in ENGINES]


def test_an_operators_mask_holds_in_every_engine_from_the_answer_on(server: Server) -> None:
    selections = "moe_guard_expert_selections_total"
    before = [ask(server, (engine, (), 12)) for engine in ENGINES]
    with masked(server, MASK) as revision:
        for engine in ENGINES:
            info = server.metric("moe_guard_program_info", engine=engine, revision=revision)
            assert info == 1
        assert of_each(server, "moe_guard_masked_experts", policy="operator") == [1, 1]
        tokens = of_each(server, "moe_guard_tokens_evaluated_total")
        under = [ask(server, (engine, (), 12)) for engine in ENGINES]
        server.wait_for(
            lambda: all(
                now >= then + 12
                for now, then in zip(
                    of_each(server, "moe_guard_tokens_evaluated_total"), tokens, strict=True
                )
            )
        )
        assert of_each(server, selections, policy="operator") == [0, 0]
        assert under[0] == under[1], "both engines mask alike"
    after = [ask(server, (engine, (), 12)) for engine in ENGINES]
    assert after == before


def test_programs_that_change_at_work_disturb_no_row_of_either_engine(server: Server) -> None:
    """Rows of both engines go through each layer together, while one is at the next program and the
    other is not yet."""
    alone = [ask(server, asked) for asked in ASKED]
    counters = ("moe_guard_mask_violations_total", "moe_guard_failures_total")
    before = [server.metric(name) for name in counters]
    done = threading.Event()
    revisions: list[str] = []

    def change() -> None:
        while not done.is_set():
            with masked(server, OF_NOBODY) as revision:
                revisions.append(revision)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                assert list(pool.map(lambda asked: ask(server, asked), ASKED)) == alone
    finally:
        done.set()
        changing.join()
    assert len(revisions) >= 2, "nothing changed meanwhile"
    assert [server.metric(name) for name in counters] == before
    assert of_each(server, "moe_guard_up") == [1, 1]


def test_a_changed_policy_file_is_in_force_in_every_engine(server: Server) -> None:
    succeeded = {"result": "success"}
    before = of_each(server, "moe_guard_reloads_total", **succeeded)
    server.policies.write_text(POLICIES.replace("atLeast: 12", "atLeast: 20"))
    server.wait_for(
        lambda: of_each(server, "moe_guard_reloads_total", **succeeded) == [n + 1 for n in before]
    )
    try:
        tokens = [
            complete(server, engine, "stop-output", max_tokens=12).usage.completion_tokens
            for engine in ENGINES
        ]
        assert tokens == [5, 5], "it was three at a lower threshold"
    finally:
        server.policies.write_text(POLICIES)
        server.wait_for(
            lambda: of_each(server, "moe_guard_reloads_total", **succeeded) == [n + 2 for n in before]
        )
