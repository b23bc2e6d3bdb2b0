"""Policies that change under a real server: files, bad files and SIGHUP, seen from outside."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from guard.policy import load_policies
from tests.integration.server.conftest import Server

pytestmark = pytest.mark.vllm

PROMPT = "the quick brown fox"
ADDED = """\
---
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: added, severity: high}
spec:
  mode: audit
  experts: {all: [{layers: 0-1, experts: [0-7]}]}
  rules:
    - name: any
      when: {count: {experts: all, over: prompt, atLeast: 1}}
      then: {block: {message: ""}}
"""
BAD = "kind: Polcy\n"


class Operator:
    """Changes the policies of a running server, and waits for what becomes of it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.file = server.policies
        self.first = self.file.read_text()

    def write(self, text: str) -> None:
        hidden = self.file.with_name(".new")
        hidden.write_text(text)
        os.replace(hidden, self.file)

    def hang_up(self) -> None:
        os.kill(self.server.pid, signal.SIGHUP)

    def reloads(self, result: str) -> float:
        return self.server.metric("moe_guard_reloads_total", result=result)

    def runs(self, revision: str) -> bool:
        return self.server.metric("moe_guard_program_info", revision=revision) == 1

    def revision(self) -> str:
        return load_policies(self.file).revision

    def answers(self) -> int:
        """How often the log said that what lies there is in force."""
        return self.server.log.read_text(errors="replace").count("policies unchanged")

    def put_back(self) -> None:
        if self.file.read_text() != self.first:
            self.write(self.first)
            self.server.wait_for(lambda: self.runs(self.revision()))


@pytest.fixture
def operator(server: Server) -> Iterator[Operator]:
    operator = Operator(server)
    yield operator
    operator.put_back()


def complete(server: Server, policy: str) -> Any:
    return server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=4,
        temperature=0,
        extra_body={"vllm_xargs": {"moe_guard_enforce": [policy]}, "ignore_eos": True},
    )


def test_a_changed_file_is_in_force_within_seconds_and_a_bad_one_never(operator: Operator) -> None:
    server, before = operator.server, operator.revision()
    good, bad = operator.reloads("success"), operator.reloads("failure")

    operator.write(operator.first + ADDED)
    server.wait_for(lambda: operator.reloads("success") == good + 1)
    added = operator.revision()
    server.wait_for(lambda: operator.runs(added))
    assert not operator.runs(before)
    said = f"policies reloaded: revision {before} -> {added} ("
    server.wait_for(lambda: said in server.log.read_text(errors="replace"))
    reply = complete(server, "added")
    assert reply.choices[0].stop_reason == "moe_guard:added/any"
    server.wait_for(lambda: bool(server.decisions(reply.id)))
    assert {row["revision"] for row in server.decisions(reply.id)} == {added}

    operator.write(BAD)
    server.wait_for(lambda: operator.reloads("failure") == bad + 1)
    assert operator.runs(added)
    assert complete(server, "added").choices[0].stop_reason == "moe_guard:added/any"
    server.wait_for(lambda: f"{operator.file}:1:" in server.log.read_text(errors="replace"))


def test_a_hangup_asks_for_a_look_and_is_answered(operator: Operator) -> None:
    server, bad = operator.server, operator.reloads("failure")

    operator.write(BAD)
    server.wait_for(lambda: operator.reloads("failure") == bad + 1)
    operator.hang_up()
    server.wait_for(lambda: operator.reloads("failure") == bad + 2)
    said = operator.answers()
    operator.put_back()
    server.wait_for(lambda: operator.answers() == said + 1)
    operator.hang_up()
    server.wait_for(lambda: operator.answers() == said + 2)


def test_of_several_api_servers_one_reloads(two_api_servers: Server) -> None:
    operator = Operator(two_api_servers)
    before = operator.reloads("success")
    try:
        operator.write(operator.first + ADDED)
        operator.hang_up()
        two_api_servers.wait_for(lambda: operator.reloads("success") == before + 1)
        two_api_servers.wait_for(lambda: operator.runs(operator.revision()))
    finally:
        operator.put_back()
