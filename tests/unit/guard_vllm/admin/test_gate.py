"""What stands before `/guard`: guesses and floods, bodies, other origins, and keys that stay unsaid."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from guard_vllm.admin import context as admin
from guard_vllm.admin.endpoint import AdminEndpoint
from guard_vllm.admin.gate import MAX_BODY_BYTES
from guard_vllm.admin.keys import AdminKeys
from guard_vllm.admin.limits import AdminLimits, Rate, RateLimit
from prometheus_client import generate_latest
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from tools.fake_admin import FakeServer

CANARY = "cAnArY-7f3a1b9e5d"
ADMIN = {"Authorization": f"Bearer {CANARY}"}
VIEWER = {"Authorization": "Bearer viewer-key"}
WRONG = {"Authorization": "Bearer wrong"}
MASK = {"experts": ["L1/E2"], "reason": "an incident"}
KILL = {"on": True, "reason": "r"}
EVIL = {"Origin": "https://evil.example"}
PREFLIGHT = EVIL | {
    "Access-Control-Request-Method": "PUT",
    "Access-Control-Request-Headers": "authorization, content-type",
}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    keys = tmp_path / "keys.yaml"
    digest = hashlib.sha256(CANARY.encode()).hexdigest()
    keys.write_text(
        f"sha256:{digest}: {{name: alice, role: admin}}\nviewer-key: {{name: bob, role: viewer}}\n"
    )
    keys.chmod(0o600)
    fake = FakeServer(tmp_path / "state", 0)
    limits = AdminLimits(
        failures_each=RateLimit(Rate(3, 10.0), clock),
        failures_all=RateLimit(Rate(5, 10.0), clock),
        changes_each=RateLimit(Rate(3, 10.0), clock),
        changes_all=RateLimit(Rate(4, 10.0), clock),
    )
    made = replace(fake.context, keys=AdminKeys.read(keys), limits=limits)
    monkeypatch.setattr(admin, "_contexts", [made])
    return fake


@pytest.fixture
def app(server: FakeServer) -> FastAPI:
    """As vLLM builds its own, told to allow every origin."""
    built = FastAPI()
    built.get("/v1/models")(lambda: "served")
    AdminEndpoint().attach_router(built)
    args = Namespace(
        allowed_origins=["*"],
        allowed_methods=["*"],
        allowed_headers=["*"],
        allow_credentials=True,
        api_key=None,
        enable_request_id_headers=False,
        middleware=[],
    )
    init_entrypoints_middleware(args, built, ())
    return built


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as http:
        yield http


def from_address(app: FastAPI, address: str) -> TestClient:
    return TestClient(app, raise_server_exceptions=False, client=(address, 4711))


def put_kill(http: TestClient, headers: dict[str, str] = ADMIN) -> int:
    return http.put("/guard/v1/kill-switch", json=KILL, headers=headers).status_code


# Keys


def test_a_key_is_compared_with_all_known_ones_in_constant_time(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def compare_digest(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    for headers in (ADMIN, VIEWER, WRONG):
        compared.clear()
        client.get("/guard/v1/masks", headers=headers)
        assert compared == [32, 32], "each known key once, by its digest, whatever was found"


def test_a_key_stands_in_no_log_metric_error_answer_or_audit_line(
    app: FastAPI,
    server: FakeServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    places: list[dict[str, str]] = [
        ADMIN,
        {"Authorization": f"Bearer  {CANARY} x"},
        {"Authorization": f"Basic {CANARY}"},
        {"Authorization": CANARY},
        {"X-Api-Key": CANARY, "Cookie": f"key={CANARY}"},
        {"Proxy-Authorization": f"Bearer {CANARY}"},
        {"X-Request-Id": CANARY},
    ]
    asked: list[tuple[str, str, object]] = [
        ("GET", "/guard/v1/status", None),
        ("GET", "/guard/v1/experts", None),
        ("GET", "/guard/v1/none", None),
        ("PUT", "/guard/v1/kill-switch", KILL),  # fails within: this server has no desk
        ("POST", "/guard/v1/masks", MASK | {"method": "force"}),
        ("DELETE", "/guard/v1/masks/mask-9", None),
        ("OPTIONS", "/guard/v1/masks", None),
        ("GET", "/guard/", None),
    ]
    with caplog.at_level(logging.DEBUG):
        for number, headers in enumerate(places):
            with from_address(app, f"192.0.2.{number}") as http:
                for method, path, body in asked:
                    answer = http.request(method, path, json=body, headers=headers)
                    said += [answer.text, str(answer.headers)]
        with from_address(app, "192.0.2.99") as http:
            body = {"reason": "r", "on": True, "key": CANARY}
            assert (
                http.put("/guard/v1/kill-switch", json=body, headers=ADMIN).status_code == 422
            )  # tells its own caller what is wrong with it, and nobody else
        server.context.store.audit("alice", "mask", "r", "done")
    files = [path.read_text() for path in server.context.store.folder.rglob("*") if path.is_file()]
    metrics = generate_latest(server.registry).decode()
    output = capfd.readouterr()

    assert "a wrong key for /guard/v1 from 192.0.2.1" in caplog.text
    assert files
    assert "moe_guard_up" in metrics
    for text in (*said, *files, caplog.text, metrics, output.out, output.err):
        assert CANARY not in text


# How often


def test_wrong_keys_are_told_so_and_then_held_up(client: TestClient, clock: Clock) -> None:
    answers = [client.get("/guard/v1/status", headers=WRONG) for _ in range(5)]

    assert [one.status_code for one in answers] == [401, 401, 401, 429, 429]
    assert answers[0].headers["WWW-Authenticate"] == "Bearer"
    assert answers[3].headers["Retry-After"] == "10"
    assert "try again in 10 s" in answers[3].json()["error"]["message"]
    # Nor is a right one heard, or the guesses would go on.
    assert client.get("/guard/v1/status", headers=VIEWER).status_code == 429
    clock.now += 10
    assert client.get("/guard/v1/status", headers=VIEWER).status_code == 200


def test_somebody_elses_wrong_keys_never_lock_out_a_right_one(app: FastAPI) -> None:
    codes = []
    for number in range(40):
        http = from_address(app, f"198.51.100.{number}")
        codes += [http.get("/guard/v1/status", headers=WRONG).status_code for _ in range(2)]

    assert codes.count(401) == 5, "in total, from however many addresses"
    assert set(codes) == {401, 429}
    operator = from_address(app, "203.0.113.1")
    assert operator.get("/guard/v1/status", headers=VIEWER).status_code == 200
    assert put_kill(operator) != 429


def test_who_gives_no_key_at_all_is_refused_and_holds_nobody_up(client: TestClient) -> None:
    codes = {client.get("/guard/v1/status").status_code for _ in range(20)}

    assert codes == {401}
    assert client.get("/guard/v1/status", headers=VIEWER).status_code == 200


def test_changes_are_held_up_and_looking_is_not(client: TestClient, clock: Clock) -> None:
    bad = MASK | {"method": "force"}  # counted all the same
    codes = [client.post("/guard/v1/masks", json=bad, headers=ADMIN).status_code for _ in range(4)]

    assert codes == [422, 422, 422, 429]
    assert client.get("/guard/v1/masks", headers=ADMIN).status_code == 200
    clock.now += 10
    assert client.post("/guard/v1/masks", json=bad, headers=ADMIN).status_code == 422


def test_the_kill_switch_is_not_held_up_by_anybody_elses_changes(app: FastAPI) -> None:
    bad = MASK | {"method": "force"}
    for number in range(6):
        from_address(app, f"198.51.100.{number}").post("/guard/v1/masks", json=bad, headers=ADMIN)

    operator = from_address(app, "203.0.113.1")
    assert operator.post("/guard/v1/masks", json=bad, headers=ADMIN).status_code == 429
    assert put_kill(operator) != 429


def test_who_may_only_look_uses_up_nobodys_changes(app: FastAPI) -> None:
    http = from_address(app, "198.51.100.1")
    assert {put_kill(http, VIEWER) for _ in range(10)} == {403}
    assert put_kill(http) != 429


# How much


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "in chunks"])
def test_a_body_that_is_too_large_is_refused(client: TestClient, is_chunked: bool) -> None:
    def body(size: int) -> Iterator[bytes]:
        yield from (b" " * 1024 for _ in range(size // 1024))

    headers = ADMIN | {"Content-Type": "application/json"}
    codes = [
        client.post(
            "/guard/v1/masks",
            content=body(size) if is_chunked else b" " * size,
            headers=headers,
        ).status_code
        for size in (MAX_BODY_BYTES, MAX_BODY_BYTES + 1024)
    ]
    assert codes == [422, 413]


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"[" * 60_000, "application/json", 400),
        (b'{"experts": ["L1/E2"], "reason": "r"', "application/json", 422),
        (b'{"experts": ["L1/E2"], "reason": "r"}', "text/plain", 422),
        (b"experts=L1%2FE2&reason=r", "application/x-www-form-urlencoded", 422),
        (b'{"experts": "L1/E2", "reason": "r"}', "application/json", 422),
        (b'{"experts": [1], "reason": "r"}', "application/json", 422),
        (b'{"experts": ["L1/E2"], "reason": 1}', "application/json", 422),
        (b'{"experts": ["L1/E2"], "reason": "%s"}' % (b"r" * 501), "application/json", 422),
        (
            json.dumps({"experts": ["L1/E2"] * 1025, "reason": "r"}).encode(),
            "application/json",
            422,
        ),
        (
            json.dumps(MASK | {"labels": {str(n): "v" for n in range(33)}}).encode(),
            "application/json",
            422,
        ),
        (json.dumps(MASK | {"labels": {"a": "v" * 257}}).encode(), "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
    ],
    ids=[
        *("nested", "cut off", "as text", "as a form", "no list", "a number", "no text"),
        *("long", "many", "many labels", "long label", "no text at all"),
    ],
)
def test_a_body_that_is_none_of_its_kind_is_refused(
    client: TestClient, content: bytes, kind: str, code: int
) -> None:
    answer = client.post("/guard/v1/masks", content=content, headers=ADMIN | {"Content-Type": kind})
    assert answer.status_code == code


def test_nobodys_body_is_read_without_a_key(client: TestClient) -> None:
    content = b"[" * (MAX_BODY_BYTES * 4)
    assert client.post("/guard/v1/masks", content=content).status_code == 401


# Other origins, and what a browser is told


@pytest.mark.parametrize("headers", [VIEWER, WRONG, {}], ids=["right", "wrong", "none"])
def test_no_other_origin_may_read_an_answer_even_where_vllm_allows_all(
    client: TestClient, headers: dict[str, str]
) -> None:
    assert client.get("/v1/models", headers=EVIL).headers["access-control-allow-origin"]
    for path in ("/guard/v1/status", "/guard/", "/guard/v1/none"):
        found = client.get(path, headers=EVIL | headers).headers
        assert not [name for name in found if name.startswith("access-control-")], path


def test_no_preflight_is_answered_even_where_vllm_allows_all(client: TestClient) -> None:
    assert client.options("/v1/models", headers=PREFLIGHT).status_code == 200
    for path in ("/guard/v1/kill-switch", "/guard/v1/status", "/guard/"):
        answer = client.options(path, headers=PREFLIGHT)
        assert answer.status_code == 401
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_cookie_is_no_key(client: TestClient) -> None:
    client.cookies.set("Authorization", f"Bearer {CANARY}")
    client.cookies.set("key", CANARY)
    assert put_kill(client, {}) == 401


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/guard/", {}, 200),
        ("/guard/v1/status", VIEWER, 200),
        ("/guard/v1/status", {}, 401),
        ("/guard/v1/none", VIEWER, 404),
    ],
)
def test_every_answer_tells_browsers_to_keep_and_frame_nothing(
    client: TestClient, path: str, headers: dict[str, str], code: int
) -> None:
    answer = client.get(path, headers=headers)
    found = answer.headers

    assert answer.status_code == code
    assert found["Cache-Control"] == "no-store"
    assert found["X-Content-Type-Options"] == "nosniff"
    assert found["X-Frame-Options"] == "DENY"
    assert found["Referrer-Policy"] == "no-referrer"
    assert found["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "default-src 'none'" in found["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in found["Content-Security-Policy"]
    assert len(found.get_list("Content-Security-Policy")) == 1


# What is there


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
PATHS = ("/guard/v1/status", "/guard/v1/masks", "/guard/v1/none", "/guard/none", "/guard/v1/../x")


def test_without_a_key_it_cannot_be_told_what_is_there(client: TestClient) -> None:
    answers = [client.request(method, path) for method in METHODS for path in PATHS]

    assert {one.status_code for one in answers} == {401}
    assert len({(one.text, str(sorted(one.headers))) for one in answers if one.text}) == 1


def test_with_a_key_it_can(client: TestClient) -> None:
    assert client.get("/guard/v1/none", headers=VIEWER).status_code == 404
    assert client.patch("/guard/v1/status", headers=VIEWER).status_code == 405


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [*PATHS, "/guard/", "/guard"])
def test_it_is_off_where_no_keys_were_given(
    client: TestClient, server: FakeServer, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for contexts in ([], [replace(server.context, keys=None)]):
        monkeypatch.setattr(admin, "_contexts", contexts)
        assert client.request(method, path, headers=ADMIN).status_code == 404


def test_other_paths_are_left_as_they_are(client: TestClient) -> None:
    answer = client.get("/v1/models", headers=WRONG)
    assert (answer.status_code, answer.json()) == (200, "served")
    assert "cache-control" not in answer.headers
    assert client.get("/guards", headers=WRONG).status_code == 404


def test_a_prefix_that_a_proxy_leaves_in_is_no_way_round(app: FastAPI) -> None:
    app.root_path = "/proxied"
    with TestClient(app, root_path="/proxied") as http:
        for path in ("/proxied/guard/v1/status", "/guard/v1/status"):
            answer = http.get(path)
            assert (answer.status_code, answer.headers.get("Cache-Control")) == (401, "no-store")
            assert http.get(path, headers=VIEWER).status_code == 200


def test_a_router_that_stands_alone_asks_for_a_key_too(server: FakeServer) -> None:
    from guard_vllm.admin.routes import build_router

    alone = FastAPI()
    alone.include_router(build_router())
    with TestClient(alone) as http:
        assert http.get("/guard/v1/masks").status_code == 401
        assert http.get("/guard/v1/masks", headers=WRONG).status_code == 401
        assert http.get("/guard/v1/masks", headers=VIEWER).status_code == 200
