"""`moe-guard mask` and its like on a real server with two API servers, and after a restart."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.server.conftest import Server, serving

pytestmark = pytest.mark.vllm

KEY = "operators-key"
PROMPT = "the quick brown fox"
WATCH = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: watch, severity: info}
spec:
  mode: enforce
  experts: {some: [{layer: 0, experts: [0-3]}]}
  rules:
    - {name: any, match: {phase: output}, when: {count: {experts: some, above: 100000}}}
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operators")
    keys = folder / "keys.yaml"
    keys.write_text(f"{KEY}: {{name: alice, role: admin}}\n")
    keys.chmod(0o600)
    return folder


def options(state: Path) -> list[str]:
    return ["--admin-keys", str(state / "keys.yaml"), "--state-dir", str(state / "state")]


@pytest.fixture(scope="module")
def operated(
    tiny_model: Path, state: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operated")
    more = [*options(state), "--api-server-count", "2"]
    with serving(folder, tiny_model, *more, policies=WATCH) as running:
        yield running


def moe_guard(server: Server, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "MOE_GUARD_URL": server.address, "MOE_GUARD_ADMIN_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", "from guard.cli import main; main()", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def call(server: Server, method: str, path: str, body: object = None) -> httpx.Response:
    """A connection of its own, so that it may come to either API server."""
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.address}/guard/v1{path}"
    return httpx.request(method, url, json=body, headers=headers, timeout=60)


def ask(server: Server, max_tokens: int = 8) -> Any:
    return server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )


def masked(server: Server) -> float:
    return server.metric("moe_guard_requests_total", outcome="masked")


def test_an_expert_is_blocked_now_and_its_selections_go_flat(operated: Server) -> None:
    def chosen() -> float:
        return operated.metric("moe_guard_expert_selections_total", policy="watch", set="some")

    ask(operated)
    operated.wait_for(lambda: chosen() > 0)
    code, said = moe_guard(
        operated, "mask", "L0/E0-3", "L1/E0-3", "--for", "2h", "--reason", "incident"
    )
    assert code == 0, said
    assert said.startswith("mask-1: L0/E0")
    before, flat = masked(operated), chosen()
    ask(operated)
    operated.wait_for(lambda: masked(operated) == before + 1)
    assert operated.metric("moe_guard_operator_masks") == 1
    assert operated.metric("moe_guard_masked_experts", policy="operator") == 8
    assert operated.metric("moe_guard_expert_selections_total", policy="operator", set="mask-1") == 0
    assert chosen() == flat
    code, said = moe_guard(operated, "unmask", "mask-1", "--reason", "over")
    assert code == 0, said
    ask(operated)
    operated.wait_for(lambda: chosen() > flat)
    assert operated.metric("moe_guard_operator_masks") == 0


def test_either_api_server_shows_and_makes_the_same_changes(operated: Server) -> None:
    for number in range(6):
        made = call(operated, "POST", "/masks", {"experts": [f"L0/E{number % 3}"], "reason": "r"})
        assert made.status_code == 201, made.text
        mask = made.json()["mask"]["id"]
        assert {
            tuple(one["id"] for one in call(operated, "GET", "/masks").json()) for _ in range(4)
        } == {(mask,)}
        revision = made.json()["revision"]
        assert operated.metric("moe_guard_program_info", revision=revision) == 1
        assert call(operated, "DELETE", f"/masks/{mask}?reason=r").status_code == 200


def test_what_cannot_be_honoured_names_layer_and_live_experts(operated: Server) -> None:
    code, said = moe_guard(operated, "mask", "L1/E0-6", "--reason", "too many")
    assert code == 1
    assert said.startswith("409: ")
    assert "layer 1 chooses 2 of 8 experts" in said
    assert call(operated, "GET", "/masks").json() == []


def test_a_request_in_flight_is_masked_from_its_next_token_on(operated: Server) -> None:
    before = masked(operated)
    tokens: list[str] = []
    has_begun = threading.Event()

    def stream() -> None:
        for chunk in operated.client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            tokens.append(chunk.choices[0].text)
            if len(tokens) == 3:
                has_begun.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert has_begun.wait(60)
    made = call(operated, "POST", "/masks", {"experts": ["L0/E0-3", "L1/E0-3"], "reason": "r"})
    assert made.status_code == 201, made.text
    so_far = len(tokens)
    thread.join(120)
    assert call(operated, "DELETE", "/masks/mask-1").status_code == 200
    assert so_far < 400, "the request had ended before the mask was there"
    operated.wait_for(lambda: masked(operated) == before + 1)


def test_a_mask_ends_by_itself(operated: Server) -> None:
    body = {"experts": ["L0/E1"], "reason": "r", "duration": "1s"}
    assert call(operated, "POST", "/masks", body).status_code == 201
    operated.wait_for(lambda: call(operated, "GET", "/masks").json() == [])
    operated.wait_for(lambda: operated.metric("moe_guard_operator_masks") == 0)


def test_modes_stay_over_a_restart_and_so_do_masks(
    operated: Server, tiny_model: Path, state: Path, tmp_path: Path
) -> None:
    """The second server has the first one's state folder; the first is of no more use behind it."""
    assert call(operated, "POST", "/masks", {"experts": ["L1/E2"], "reason": "r"}).status_code == 201
    code, said = moe_guard(operated, "mode", "watch", "audit", "--reason", "noise")
    assert code == 0, said
    with serving(tmp_path / "again", tiny_model, *options(state), policies=WATCH) as again:
        found = call(again, "GET", "/status").json()
        assert [mask["experts"] for mask in found["masks"]] == [["L1/E2"]]
        assert found["modes"] == {"watch": "audit"}
        assert again.metric("moe_guard_operator_masks") == 1
        before = masked(again)
        ask(again)
        again.wait_for(lambda: masked(again) == before + 1)
        written = (state / "state" / "audit.jsonl").read_text()
        assert '"by":"alice","what":"mode","reason":"noise","outcome":"done"' in written
