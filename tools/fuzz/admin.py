"""`/guard/v1` over ASGI, with vLLM's own handlers of errors.

Schemathesis makes requests of the API's own description, as it says and not as it says, by an
administrator, by somebody who may only look, and without a key; beside them there are damaged bodies.

Every answer is one that the description has. One that refuses leaves the overrides, the policies in
force and the decisions as they were; somebody who may only look, or nobody, changes nothing at all.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from guard_vllm.admin import context as admin
from guard_vllm.admin.endpoint import AdminEndpoint
from guard_vllm.admin.limits import AdminLimits, Rate, RateLimit
from guard_vllm.settings import Settings
from hypothesis import strategies as st
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from guard.overrides.desk import Desk
from guard.overrides.model import Overrides
from guard.policy import PolicyError, PolicySet, read_policies
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology
from tools.fake_admin import KEY, VIEWER_KEY, FakeServer
from tools.fuzz.mutation import edited, edits
from tools.fuzz.part import Outcome, Part, Parts

_STREAMS: Final = ("/guard/v1/events/stream", "/guard/events")
"""Which have no end, and take nothing."""

_POLICY: Final = (
    "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: NAME}\nspec:\n  mode: enforce\n"
    "  experts: {one: [{layer: 1, experts: 3}]}\n"
    "  rules: [{name: r, when: {count: {experts: one, above: 3}}, then: {block: {}}}]\n"
)
_TOPOLOGY: Final = Topology("Test", tuple(MoELayer(number, 128, 8) for number in range(8)))


class _Result(NamedTuple):
    revision: str
    fault: str | None = None


class Engines:
    """Compile what they get, as real ones do."""

    def __init__(self, in_force: PolicySet, fake: FakeServer) -> None:
        self.in_force = in_force
        self.ask = fake.ask

    def apply(self, load: Callable[[], PolicySet]) -> _Result:
        try:
            found = load()
            compile_policies(found, _TOPOLOGY)
        except PolicyError as error:
            return _Result(self.in_force.revision, str(error))
        self.in_force = found
        return _Result(found.revision)


class Server:
    """The app, and what it may change."""

    def __init__(self, folder: Path) -> None:
        policies = folder / "policies"
        policies.mkdir()
        for name in ("a", "b"):
            (policies / f"{name}.yaml").write_text(_POLICY.replace("NAME", name))
        texts = read_policies(policies)
        self._fake = FakeServer(folder / "state", port=0)
        self._fake.decide(times=3)
        store = self._fake.store
        store.keep_texts(texts)
        self._engines = Engines(PolicySet((), ""), self._fake)
        desk = Desk(store, self._engines.apply)
        desk.take(texts)
        self._base, _ = Overrides().with_mask([(1, 2)], by="alice", reason="r", now=0.0)
        desk.change(lambda _: self._base)
        no_limit = RateLimit(Rate(burst=1 << 30, every_s=0.0))  # nothing but 429 would come, else
        self.context = dataclasses.replace(
            self._fake.context,
            settings=Settings(policies=str(policies), state_dir=str(store.folder)),
            desk=desk,
            reloader=self._engines,  # type: ignore[arg-type]
            limits=AdminLimits(no_limit, no_limit, no_limit, no_limit),
        )
        self.app = FastAPI()
        self.app.state.args = SimpleNamespace(log_error_stack=False)
        init_exception_handler(self.app)
        AdminEndpoint().attach_router(self.app)

    def state(self) -> object:
        num_decisions = len(list(self.context.bus.decisions))
        return self.context.store.read(), self._engines.in_force.revision, num_decisions

    def outcome(self, status: int) -> Outcome:
        """What was changed is changed back: an example does not depend on those ahead of it."""
        assert 200 <= status < 500, status
        if status < 300 and self.context.store.read() != self._base:
            self.context.desk.change(lambda _: self._base)
        return Outcome(status < 300, str(status))


def parts(folder: Path) -> Parts:
    logging.getLogger("guard_vllm").setLevel(logging.CRITICAL)  # a line for each refusal
    server = Server(folder)
    admin._contexts[:] = [server.context]
    schema: BaseSchema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    for path in _STREAMS:
        schema = schema.exclude(path=path)
    cases = st.one_of(
        schema.as_strategy(GenerationMode.POSITIVE), schema.as_strategy(GenerationMode.NEGATIVE)
    )
    made: dict[str, Part[Any]] = {
        name: Part(cases, _case_reader(server, headers, may_change=name == "admin"), (), server.state)
        for name, headers in (("admin", _bearer(KEY)), ("viewer", _bearer(VIEWER_KEY)))
    }
    made["keys"] = Part(
        st.tuples(cases, _HEADERS),
        lambda asked: _case_reader(
            server, asked[1], may_change=KEY in asked[1].get("Authorization", "")
        )(asked[0]),
        (),
        server.state,
    )
    made["bodies"] = Part(_bodies(), _body_reader(server), (), server.state)
    return made


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


_HEADERS: Final = st.sampled_from(
    [
        {},
        _bearer(KEY),
        _bearer(VIEWER_KEY),
        *({"Authorization": value} for value in (KEY, "Bearer", "Bearer ", f"Basic {KEY}", "bearer x")),
        {"Authorization": f"Bearer {KEY}x"},
        {"Origin": "https://evil.example", "Authorization": f"bearer {VIEWER_KEY}"},
    ]
)


def _case_reader(
    server: Server, headers: dict[str, str], *, may_change: bool
) -> Callable[[Case[Any]], Outcome]:
    def read(case: Case[Any]) -> Outcome:
        before = server.state()
        response = case.call(headers=dict(headers))
        is_refused = response.status_code >= 400
        try:
            case.validate_response(response, checks=_REFUSAL_CHECKS if is_refused else _CHECKS)
        except FailureGroup as error:
            raise AssertionError(str(error)) from error
        if not may_change:
            assert server.state() == before, f"changed by somebody who may not: {response.status_code}"
        return server.outcome(response.status_code)

    return read


_REFUSAL_CHECKS: Final = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
]
_CHECKS: Final = [*_REFUSAL_CHECKS, checks.response_schema_conformance]


_REASON: Final = b'{"reason":"r"}'
_ASKED: Final = (
    ("POST", "/masks", b'{"experts":["L1/E2","L0/E5-9"],"reason":"r","duration":"2h","method":"drop"}'),
    ("POST", "/masks", b'{"experts":["L1/E2"],"reason":"r","labels":{"tenant":"a"},"request":""}'),
    ("PUT", "/kill-switch", b'{"on":true,"reason":"r"}'),
    ("PUT", "/policies/a/mode", b'{"mode":"audit","reason":"r"}'),
    ("POST", "/reload", _REASON),
)
_WORDS: Final = (
    *(
        b"NaN",
        b"-Infinity",
        b'"\\ud800"',
        b"1e999",
        b"null",
        b"[]",
        b'"L1/E0-127"',
        b'"L7/E999999"',
        b"[" * 2000,
    ),
    *(b'"L1/E1-0"', b'"x":1,', b'"90d"', b'"99999999d"', b'"0s"', b'"force"', b"\xff", b"\xef\xbb\xbf"),
)
_PATHS: Final = st.sampled_from(
    [
        *(
            "",
            "",
            "",
            "",
            "/",
            "//",
            "/..",
            "%2e%2e",
            "%00",
            "%ff",
            "?limit=0",
            "?limit=NaN",
            "?reason=%ff",
        ),
        *(";x", "\\", "/masks/mask-1", "?policy=%F0%9F", "#"),
    ]
)
_TYPES: Final = st.sampled_from(
    [
        "application/json",
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "",
        "multipart/form-data",
    ]
)


class Asked(NamedTuple):
    method: str
    path: str
    body: bytes
    content_type: str


def _bodies() -> st.SearchStrategy[Asked]:
    return st.builds(
        lambda asked, changes, more, kind, method: Asked(
            method or asked[0], asked[1] + more, edited(asked[2], changes), kind
        ),
        st.sampled_from(_ASKED),
        st.lists(edits(_WORDS), max_size=2),
        _PATHS,
        _TYPES,
        st.sampled_from([None, None, None, None, "GET", "HEAD", "OPTIONS", "PATCH", "DELETE", "TRACE"]),
    )


def _body_reader(server: Server) -> Callable[[Asked], Outcome]:
    client = TestClient(server.app, raise_server_exceptions=True)

    def read(asked: Asked) -> Outcome:
        response = client.request(
            asked.method,
            f"/guard/v1{asked.path}",
            content=asked.body,
            headers=_bearer(KEY) | {"Content-Type": asked.content_type},
            follow_redirects=False,
        )
        return server.outcome(response.status_code)

    return read
