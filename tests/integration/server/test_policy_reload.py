"""Policies change while a server runs: as an operator does it, seen from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from guard.policy import parse_policies
from tests.integration.server.conftest import POLICIES, Server

pytestmark = pytest.mark.vllm

LATE = """\
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: late, severity: info}
spec:
  mode: enforce
  experts: {first: [{layers: 0-1, experts: [0-6]}]}
  rules:
    - name: any
      match: {phase: output}
      when: {count: {experts: first, over: request, atLeast: 1}}
"""
STOPS = LATE.replace("name: any", "name: stop") + "      then: {block: {message: Stopped late.}}\n"


def write(server: Server, text: str) -> None:
    beside = server.policies.with_suffix(".new")
    beside.write_text(text)
    beside.replace(server.policies)


def put(server: Server, text: str, result: str = "success") -> None:
    """Replace the policies, and wait until the server says what became of them."""
    before = server.metric("moe_guard_reloads_total", result=result)
    write(server, text)
    os.kill(server.pid, signal.SIGHUP)
    server.wait_for(lambda: server.metric("moe_guard_reloads_total", result=result) > before)


@pytest.fixture(autouse=True)
def as_before(server: Server) -> Iterator[None]:
    yield
    if in_force(server, POLICIES) == 1:
        write(server, POLICIES)  # those that were refused are taken back, which is no reload
    else:
        put(server, POLICIES)


def chunks(server: Server, max_tokens: int) -> Iterator[tuple[str, str | None]]:
    """A streamed request's id and finish reason, a token at a time."""
    answers = server.client.completions.create(
        model="tiny",
        prompt=[5, 6, 7, 8],
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for answer in answers:
        yield answer.id, answer.choices[0].finish_reason


def in_force(server: Server, text: str) -> float:
    return server.metric("moe_guard_program_info", revision=parse_policies(text).revision)


def test_a_request_under_way_is_judged_by_the_new_policies_from_its_next_token_on(
    server: Server,
) -> None:
    stream = chunks(server, 400)
    request_id, _ = next(stream)
    put(server, POLICIES + LATE)
    assert (in_force(server, POLICIES), in_force(server, POLICIES + LATE)) == (0, 1)
    reasons = [reason for _, reason in stream]
    assert reasons[-1] == "length"
    assert len(reasons) > 2, "it was over when the policies changed"

    def decided() -> dict[str, dict[str, Any]]:
        return {row["policy"]: row for row in server.decisions(request_id)}

    server.wait_for(lambda: "late" in decided())
    old, new = decided()["watch"], decided()["late"]
    assert old["revision"] == parse_policies(POLICIES).revision
    assert new["revision"] == parse_policies(POLICIES + LATE).revision
    assert (old["unseen_tokens"], new["unseen_tokens"]) == (0, new["position"])


def test_a_new_block_ends_a_request_that_is_under_way(server: Server) -> None:
    stream = chunks(server, 400)
    next(stream)
    put(server, POLICIES + STOPS)
    *_, (request_id, reason) = stream

    assert reason == "content_filter"
    server.wait_for(lambda: bool(server.decisions(request_id)))
    assert "late" in {row["policy"] for row in server.decisions(request_id)}


def test_bad_policies_are_refused_counted_and_logged_and_the_old_ones_stay(server: Server) -> None:
    put(server, POLICIES + LATE.replace("atLeast", "atleast"), result="failure")

    assert in_force(server, POLICIES) == 1
    server.wait_for(lambda: "policies not reloaded" in server.log.read_text())
    assert "did you mean" in server.log.read_text()
    [answer] = server.client.completions.create(
        model="tiny", prompt=[5], max_tokens=3, extra_body={"ignore_eos": True}
    ).choices
    assert answer.finish_reason == "length"


def test_masks_that_there_is_no_room_for_are_refused_by_the_number(server: Server) -> None:
    rules = "".join(
        f"    - name: m{number}\n"
        f"      when: {{count: {{experts: first, over: 4, atLeast: {number + 1}}}}}\n"
        "      then: {mask: {experts: first}}\n"
        for number in range(65)
    )
    text = LATE.partition("  rules:\n")[0].replace("[0-6]", "[0-4]") + "  rules:\n" + rules
    put(server, POLICIES + text, result="failure")

    said = "have 66 mask actions, but the server was started with room for 64"
    server.wait_for(lambda: said in server.log.read_text())
    assert in_force(server, POLICIES) == 1


def test_what_a_request_may_ask_for_is_what_is_in_force(server: Server) -> None:
    put(server, POLICIES + LATE)
    body = {
        "model": "tiny",
        "prompt": [5, 6],
        "max_tokens": 3,
        "vllm_xargs": {"moe_guard_enforce": ["late"]},
    }
    assert httpx.post(f"{server.address}/v1/completions", json=body).status_code == 200
    put(server, POLICIES)
    deadline = time.monotonic() + 5
    while (status := httpx.post(f"{server.address}/v1/completions", json=body).status_code) == 200:
        assert time.monotonic() < deadline
    assert status == 400
