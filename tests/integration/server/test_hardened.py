"""A real server with signed policies and admin keys, whose vLLM allows every origin."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from guard.policy import load_texts
from guard.source.bundle import read_bundle
from guard.source.serial import SERIAL_FILE
from tests.integration.server.conftest import Server, serving
from tests.unit.source.signing import OTHER, OWN, key_file, numbered, signed
from tests.unit.source.writing import bundle, policy

pytestmark = pytest.mark.vllm

KEY = {"Authorization": "Bearer cAnArY-of-an-operator"}
WRONG = {"Authorization": "Bearer wrong"}
EVIL = {"Origin": "https://evil.example"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hardened")
    publish(made, signed(5, a=policy("a")))
    key_file(made, OWN)
    keys = made / "admin.yaml"
    keys.write_text("cAnArY-of-an-operator: {name: alice, role: admin}\n")
    keys.chmod(0o600)
    return made


@pytest.fixture(scope="module")
def hardened(tiny_model: Path, folder: Path) -> Iterator[Server]:
    arguments = ["--policies", str(folder / "bundle.json"), "--policy-key", str(folder / "keys.pem")]
    arguments += ["--state-dir", str(folder / "state"), "--admin-keys", str(folder / "admin.yaml")]
    arguments += ["--allowed-origins", '["*"]']
    own = {"bundle_cache": str(folder / "cache")}
    arguments += ["--additional-config", json.dumps({"moe_guard": own})]
    with serving(folder / "server", tiny_model, *arguments) as running:
        yield running


def publish(folder: Path, content: bytes) -> None:
    (folder / "next").write_bytes(content)
    os.replace(folder / "next", folder / "bundle.json")


def in_force(server: Server) -> str:
    answer = httpx.get(f"{server.address}/guard/v1/status", headers=KEY, timeout=60)
    revision: str = answer.json()["revision"]
    return revision


def revision_of(name: str) -> str:
    return load_texts(read_bundle(numbered(1, a=policy(name)), "b")).revision


def test_only_what_the_key_signed_takes_effect_and_nothing_older(
    hardened: Server, folder: Path
) -> None:
    def refused() -> float:
        return hardened.metric("moe_guard_reloads_total", result="failure")

    assert in_force(hardened) == revision_of("a")
    for content, message in (
        (bundle(b=policy("b")), "is not signed, and policy_key takes nothing else"),
        (signed(6, key=OTHER, b=policy("b")), "is not signed by a key of policy_key"),
        (signed(4, a=policy("c")), "has serial 4, older than 5"),
    ):
        before = refused()
        publish(folder, content)
        hardened.wait_for(lambda before=before: refused() > before)  # type: ignore[misc]
        assert message in hardened.log.read_text(errors="replace")
        assert in_force(hardened) == revision_of("a")
    publish(folder, signed(6, a=policy("d")))
    hardened.wait_for(lambda: in_force(hardened) == revision_of("d"))
    hardened.wait_for(lambda: '"serial":6' in (folder / "state" / SERIAL_FILE).read_text())
    publish(folder, signed(5, a=policy("a")))
    answer = httpx.post(
        f"{hardened.address}/guard/v1/reload", json={"reason": "r"}, headers=KEY, timeout=60
    )
    assert answer.status_code == 409
    assert "has serial 5, older than 6" in answer.text
    assert in_force(hardened) == revision_of("d")


def test_the_admin_api_allows_no_origin_and_says_nothing_without_a_key(hardened: Server) -> None:
    base = hardened.address
    preflight = EVIL | {"Access-Control-Request-Method": "PUT"}
    assert httpx.get(f"{base}/v1/models", headers=EVIL).headers["access-control-allow-origin"] == "*"
    for method in ("GET", "PUT", "PATCH", "OPTIONS"):
        for path in ("/guard/v1/status", "/guard/v1/kill-switch", "/guard/none"):
            answer = httpx.request(method, base + path, headers=preflight)
            assert answer.status_code == 401
            assert not [name for name in answer.headers if name.startswith("access-control-")]
            assert answer.headers["Cache-Control"] == "no-store"
    shown = httpx.get(f"{base}/guard/v1/status", headers=EVIL | KEY)
    assert shown.status_code == 200
    assert "access-control-allow-origin" not in shown.headers


def test_guesses_are_held_up_and_no_key_is_in_the_log(hardened: Server, folder: Path) -> None:
    url = f"{hardened.address}/guard/v1/status"
    codes = [httpx.get(url, headers=WRONG).status_code for _ in range(14)]

    assert codes[0] == 401
    assert codes[-1] == 429
    assert "a wrong key for /guard/v1 from 127.0.0.1" in hardened.log.read_text(errors="replace")
    written = [hardened.log, *(path for path in (folder / "state").iterdir() if path.is_file())]
    for path in written:
        assert "cAnArY" not in path.read_text(errors="replace")
    assert "cAnArY" not in httpx.get(f"{hardened.address}/metrics").text
