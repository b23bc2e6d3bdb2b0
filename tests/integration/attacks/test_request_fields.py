"""Fields and headers of a request that try to loosen what applies to it, or to forge what is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.integration.attacks.asking import (
    ALLOWED_TOKENS,
    CHAT,
    COMPLETIONS,
    NOBODY,
    OUTPUT,
    PROMPT,
    SAMPLED,
    body_of,
    complete,
    only_choice,
    post,
)
from tests.integration.attacks.conftest import ADMIN_KEY, RED_KEY
from tests.integration.server.conftest import Server

pytestmark = pytest.mark.vllm

BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: body_of(COMPLETIONS),
    CHAT: body_of(CHAT),
    "/v1/responses": {"model": "tiny", "input": PROMPT},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 4}},
}
RED_HEADER = {"x-team": "red"}  # what an exception of the rule asks for


def blocked(choice: Mapping[str, Any]) -> bool:
    return (choice["finish_reason"], len(choice["token_ids"])) == ("content_filter", ALLOWED_TOKENS)


@pytest.mark.parametrize(
    "xargs",
    [
        {"moe_guard_mode": "audit"},
        {"moe_guard_off": 1},
        {"moe_guard": 0},
        {"moe_guard_labels": "team=red"},
        {"moe_guard_labels": ["red"]},
        {"moe_guard_labels": {"team": "red"}},
        {"moe_guard_day": "1999-01-01"},
        {"moe_guard_enforce": "stop-output"},
        {"moe_guard_enforce": [1, 2]},
        {"moe_guard_enforce": {"stop-output": False}},
        {"moe_guard_enforce": ["-stop-output"]},
        {"moe_guard_enforce ": []},
    ],
    ids=json.dumps,
)
def test_arguments_that_would_loosen_are_refused(http: httpx.Client, xargs: dict[str, Any]) -> None:
    answer = post(http, COMPLETIONS, OUTPUT, body_of(COMPLETIONS, vllm_xargs=xargs))
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "xargs",
    [{f"moe_guard_{'x' * 200_000}": 1}, {"moe_guard_enforce": ["x" * 200_000]}],
    ids=["key", "policy"],
)
def test_an_error_does_not_send_back_what_it_was_sent(
    http: httpx.Client, xargs: dict[str, Any]
) -> None:
    answer = post(http, COMPLETIONS, OUTPUT, body_of(COMPLETIONS, vllm_xargs=xargs))
    assert answer.status_code == 400
    assert len(answer.content) < 1_000


@pytest.mark.parametrize(
    "fields",
    [
        {"vllm_xargs": {"moe_guard_enforce": []}},
        {"vllm_xargs": {"moe_guard_enforce": ["audited"] * 20_000}},
        {"vllm_xargs": {"MOE_GUARD_OFF": 1, "mode": "audit", "enforce": "off"}},
        {"vllm_xargs": {}},
        {"moe_guard_enforce": [], "moe_guard_labels": {"team": "red"}},
        {"extra_args": {"moe_guard_labels": {"team": "red"}}},
        {"extra_body": {"vllm_xargs": {"moe_guard_labels": {"team": "red"}}}},
        {"sampling_params": {"extra_args": {"moe_guard_labels": {"team": "red"}}}},
        {"kv_transfer_params": {"moe_guard_labels": {"team": "red"}, "moe_guard_day": "1999-01-01"}},
        {"metadata": {"moe_guard_labels": {"team": "red"}}},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_fields_that_are_not_for_it_change_nothing(http: httpx.Client, fields: dict[str, Any]) -> None:
    assert blocked(only_choice(complete(http, OUTPUT, **fields)))


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ('"vllm_xargs": {"moe_guard_enforce": ["audited"]}, "vllm_xargs": {}', 200),
        ('"vllm_xargs": {"moe_guard_enforce": ["audited"], "moe_guard_enforce": []}', 200),
        ('"vllm_xargs": {}, "vllm_xargs": {"moe_guard_labels": "team=red"}', 400),
        ('"vllm_xargs": {"moe_guard\\u005flabels": "team=red"}', 400),
        ('"vllm_xargs": {"moe_guard_enforce": ["\\ud800"]}', 400),
        ('"vllm_xargs": {"\\u0000moe_guard_labels": "team=red"}', 200),
    ],
    ids=["key twice", "argument twice", "second counts", "escaped", "surrogate", "zero"],
)
def test_json_that_is_read_two_ways_is_not_read_loosely(
    http: httpx.Client, ending: str, status: int
) -> None:
    body = json.dumps(body_of(COMPLETIONS))[:-1] + f", {ending}}}"
    headers = {**OUTPUT, "content-type": "application/json"}
    answer = http.post(COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert blocked(only_choice(answer.json()))


@pytest.mark.parametrize(
    "extra_args",
    [{"moe_guard_labels": {"team": "red"}}, {"moe_guard_day": "1999-01-01"}, {"moe_guard_off": True}],
    ids=json.dumps,
)
def test_an_api_that_takes_sampling_parameters_takes_none_of_the_guards(
    http: httpx.Client, extra_args: dict[str, Any]
) -> None:
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 9, "extra_args": extra_args}}
    assert post(http, "/inference/v1/generate", OUTPUT, body).status_code == 400


def test_a_header_of_a_label_is_believed_where_no_proxy_sets_it(http: httpx.Client) -> None:
    """Not defended: docs/labels.md says to use headers only behind a proxy that sets them."""
    assert only_choice(complete(http, OUTPUT | RED_HEADER))["finish_reason"] == "length"
    without = only_choice(complete(http, NOBODY))
    assert without["finish_reason"] == "length", "nor need a caller say whose rules are its own"


def test_a_key_gives_what_a_header_cannot_take(http: httpx.Client) -> None:
    keyed = {"authorization": f"Bearer {RED_KEY}", "x-team": "blue"}
    assert only_choice(complete(http, OUTPUT | keyed))["finish_reason"] == "length"
    guessed = {"authorization": f"Bearer {RED_KEY[:-1]}"}
    assert blocked(only_choice(complete(http, OUTPUT | guessed)))


@pytest.mark.parametrize(
    "value",
    [
        "r" + "e" * 255,
        "red,blue",
        "RED",
        "réd".encode(),
        b"\xff\xfe",
        "blue red",
    ],
    ids=["long", "list", "case", "accent", "no text", "two words"],
)
def test_a_label_that_is_nearly_that_of_the_exception_is_another(
    http: httpx.Client, value: str | bytes
) -> None:
    sent = value if isinstance(value, bytes) else value.encode()
    headers = [(b"x-tenant", b"output"), (b"x-team", sent)]
    answer = http.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers)
    assert blocked(only_choice(answer.json()))


def test_a_label_with_characters_that_no_label_has_is_refused(http: httpx.Client) -> None:
    """Full-width letters: headers are read as latin-1, where some of their bytes are none."""
    headers = [(b"x-tenant", b"output"), (b"x-team", "\uff52\uff45\uff44".encode())]
    answer = http.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers)
    assert answer.status_code == 400
    assert "characters that no label has" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        [("x-team", "blue"), ("x-team", "red")],
        [("X-Team", "red"), ("x-team", "red")],
        [("authorization", "Bearer a"), ("authorization", f"Bearer {RED_KEY}")],
        [("x-team", "r" * 257)],
    ],
    ids=["two values", "two spellings", "two keys", "257 characters"],
)
def test_a_label_that_two_readers_could_read_differently_is_refused(
    http: httpx.Client, headers: list[tuple[str, str]]
) -> None:
    given = [*OUTPUT.items(), *headers]
    answer = http.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=given)
    assert answer.status_code == 400
    assert "sk-" not in answer.text


@pytest.mark.parametrize(
    "line",
    [
        b"X-Tenant: output\r\nX-Team: red\x00",
        b"X-Tenant: output\nX-Team: blue\n red",
        b"X-Tenant: output\r\nX-Team : red",
        b"X-Tenant: output\r\nX-Team: re\rd",
        b"X-Tenant: output\r\nX\x00-Team: red",
        b"X-Tenant: output\r\nX_Team: red",
    ],
    ids=["zero", "folded", "space", "bare return", "zero in name", "underscore"],
)
def test_a_header_that_is_not_one_gives_no_exemption(server: Server, line: bytes) -> None:
    body = json.dumps(body_of(COMPLETIONS)).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % COMPLETIONS.encode()
    head += line + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    said = exchange(server, head + body)
    status = int(said.split()[1])
    assert status == 400 or b'"finish_reason":"content_filter"' in said, said


def exchange(server: Server, sent: bytes) -> bytes:
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return received


@pytest.mark.parametrize(
    "request_id",
    ["x" * 10_000, "a\nCRITICAL MoE Guard: forged", "a\x1b[2Jb", "a\x85b", "a\u2028b", "a\ud800b"],
    ids=["long", "line", "terminal", "next line", "line separator", "surrogate"],
)
@pytest.mark.parametrize("path", BODIES)
def test_an_id_that_would_fill_or_forge_a_log_is_refused(
    http: httpx.Client, path: str, request_id: str
) -> None:
    """Before a stream is opened, too."""
    for stream in (False, True):
        body = json.dumps(BODIES[path] | {"request_id": request_id, "stream": stream})
        headers = {**OUTPUT, "content-type": "application/json"}
        answer = http.post(path, content=body, headers=headers)
        assert answer.status_code == 400, answer.text
        assert "request_id" in answer.text


@pytest.mark.parametrize("request_id", [b"x" * 10_000, b"a\x85b"], ids=["long", "next line"])
def test_an_id_in_a_header_is_not_better(http: httpx.Client, request_id: bytes) -> None:
    headers = [(b"x-tenant", b"output"), (b"x-request-id", request_id)]
    answer = http.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers)
    assert answer.status_code == 400
    assert "request_id" in answer.text


def test_two_requests_of_one_id_are_judged_each_by_its_own_rules(http: httpx.Client) -> None:
    """Hope: the one without rules lends the other its verdict, or takes the other's tokens."""
    free = only_choice(complete(http, NOBODY, max_tokens=200))["token_ids"]
    answers: dict[str, dict[str, Any]] = {}

    def ask(name: str, headers: dict[str, str]) -> None:
        same = headers | {"x-request-id": "the-same"}
        answers[name] = only_choice(complete(http, same, max_tokens=200))

    threads = [
        threading.Thread(target=ask, args=(f"{name}{number}", headers))
        for number in range(4)
        for name, headers in (("free", NOBODY), ("blocked", OUTPUT))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for name, choice in answers.items():
        if name.startswith("free"):
            assert choice["token_ids"] == free
        else:
            assert blocked(choice)
    assert len(answers) == len(threads)


@pytest.fixture
def masked_id(http: httpx.Client) -> Iterator[str]:
    """A request's id under an operator's mask."""
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    mask = {"experts": ["L0/E0-3"], "reason": "a test", "request": "cmpl-suspect-0"}
    made = http.post("/guard/v1/masks", json=mask, headers=admin)
    assert made.status_code == 201, made.text
    yield "suspect"
    number = made.json()["mask"]["id"]
    assert http.delete(f"/guard/v1/masks/{number}?reason=over", headers=admin).status_code == 200


def test_an_id_under_an_operators_mask_is_masked_whoever_gives_it(
    http: httpx.Client, server: Server, masked_id: str
) -> None:
    """So a caller can only take a mask on, and whoever sends another id is not under it."""

    def masked() -> float:
        return server.metric("moe_guard_requests_total", outcome="masked")

    before = masked()
    complete(http, {"x-request-id": "another"})
    complete(http, {"x-request-id": masked_id})
    server.wait_for(lambda: masked() >= before + 1)
    assert masked() == before + 1


def test_no_id_keeps_a_caller_out_of_a_sample(http: httpx.Client) -> None:
    """vLLM adds random digits to an id, and the sample goes by all of it."""
    endings = {
        only_choice(complete(http, SAMPLED | {"x-request-id": "lucky"}, max_tokens=1))["finish_reason"]
        for _ in range(40)
    }
    assert endings == {"content_filter", "length"}


def test_a_body_that_is_none_or_too_deep_does_not_stop_the_server(http: httpx.Client) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    head = json.dumps({"model": "tiny", "prompt": PROMPT})[:-1]
    for body in ("", "{", "null", "[]", '"moe_guard"', f'{head}, "vllm_xargs": {{"a": {deep}}}}}'):
        headers = {**OUTPUT, "content-type": "application/json"}
        assert http.post(COMPLETIONS, content=body, headers=headers).status_code >= 400
    assert blocked(only_choice(complete(http, OUTPUT)))
