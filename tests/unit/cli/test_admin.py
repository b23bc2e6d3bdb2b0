"""The commands over `/guard/v1`: what they ask a server, and what they say of its answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from guard.cli import app

MASK = {
    "id": "mask-1",
    "experts": ["L12/E85"],
    "by": "alice",
    "reason": "incident",
    "created": "2026-11-30T05:00:00+00:00",
    "until": "2026-11-30T07:00:00+00:00",
    "method": "reroute",
    "labels": {"tenant": "acme"},
    "request": "",
}
STATUS = {
    "up": True,
    "revision": "abc",
    "policies": ["a"],
    "engines": [{"engine": 0, "revision": "abc", "live": True, "blind_layers": 0}],
    "kill_switch": False,
    "modes": {"a": "off"},
    "masks": [MASK],
}


class Server:
    """Answers everything with `answer`; keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: tuple[int, Any] = (200, {"revision": "abc"})
        self.asked: list[tuple[str, str, str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                key = self.headers.get("Authorization", "")
                server.asked.append((self.command, self.path, key, body))
                code, document = server.answer
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                """Not into the test's output."""

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def run(server: Server, *arguments: str, key: str = "k") -> tuple[int, str, str]:
    environment = {"MOE_GUARD_URL": server.url, "MOE_GUARD_ADMIN_KEY": key, "COLUMNS": "200"}
    result = CliRunner().invoke(app, list(arguments), env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_mask_is_asked_for_as_it_is_written(server: Server) -> None:
    server.answer = (201, {"revision": "def", "mask": MASK})
    code, text, _ = run(
        server,
        *("mask", "L12/E85", "L13/E7-9", "--for", "2h", "--reason", "incident"),
        *("--label", "tenant=acme", "--method", "drop"),
    )
    assert code == 0
    assert text == "mask-1: L12/E85 until 2026-11-30T07:00:00+00:00; revision def\n"
    [(method, path, key, body)] = server.asked
    assert (method, path, key) == ("POST", "/guard/v1/masks", "Bearer k")
    assert body == {
        "experts": ["L12/E85", "L13/E7-9"],
        "reason": "incident",
        "method": "drop",
        "duration": "2h",
        "labels": {"tenant": "acme"},
    }


def test_a_refusal_is_said_as_the_server_says_it(server: Server) -> None:
    server.answer = (409, {"error": {"message": "layer 1 chooses 2 of 16 experts", "code": 409}})
    code, _, error = run(server, "mask", "L1/E1", "--reason", "r")
    assert code == 1
    assert error == "409: layer 1 chooses 2 of 16 experts\n"
    server.answer = (404, {"detail": "Not Found"})
    _, _, error = run(server, "masks")
    assert "--admin-keys" in error
    assert "VLLM_PLUGINS" in error


def test_masks_are_listed_and_lifted(server: Server) -> None:
    server.answer = (200, [MASK])
    _, text, _ = run(server, "masks")
    assert "tenant=acme" in text
    assert "incident" in text
    _, text, _ = run(server, "masks", "--json")
    assert json.loads(text) == [MASK]
    server.answer = (200, {"revision": "abc"})
    code, text, _ = run(server, "unmask", "mask-1", "--reason", "all clear")
    assert (code, text) == (0, "mask-1: lifted; revision abc\n")
    assert server.asked[-1][:2] == ("DELETE", "/guard/v1/masks/mask-1?reason=all+clear")


def test_status_says_whether_the_guard_is_up(server: Server) -> None:
    server.answer = (200, STATUS)
    code, text, _ = run(server, "status")
    assert code == 0
    assert text.startswith("up, revision abc, 1 policies\n")
    assert "a: off, whatever its file says" in text
    server.answer = (200, STATUS | {"up": False, "kill_switch": True})
    code, text, _ = run(server, "status")
    assert code == 2
    assert text.startswith("NOT UP, revision abc, 1 policies; the kill switch is on")


def test_modes_and_the_kill_switch(server: Server) -> None:
    assert run(server, "mode", "a b", "written", "--reason", "r")[0] == 0
    assert run(server, "kill-switch", "--on", "--reason", "r")[0] == 0
    assert [asked[:2] + asked[3:] for asked in server.asked] == [
        ("PUT", "/guard/v1/policies/a%20b/mode", {"mode": None, "reason": "r"}),
        ("PUT", "/guard/v1/kill-switch", {"on": True, "reason": "r"}),
    ]


def test_what_is_missing_is_said_before_anything_is_asked(server: Server) -> None:
    code, _, error = run(server, "masks", key="")
    assert code == 1
    assert "MOE_GUARD_ADMIN_KEY holds no key" in error
    code, _, error = run(server, "mask", "L1/E1", "--reason", "r", "--label", "acme")
    assert code == 1
    assert "write KEY=VALUE" in error
    assert server.asked == []


def test_a_server_that_does_not_answer_is_said(server: Server) -> None:
    server.close()
    code, _, error = run(server, "masks")
    assert code == 1
    assert "does not answer" in error.replace("\n", " ")
