"""What requests ask of the guard: vLLM's own models of a body, the guard's checks around a stand-in of
the engine, and the middleware that gives labels.

What reaches the engine holds nothing of the guard's but policies that there are, and labels that the
headers gave. What is refused never reaches it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from guard_vllm.frontend.blocked import MARK, Sources
from guard_vllm.frontend.request_args import (
    MAX_ID_CHARACTERS,
    RequestArgumentError,
    _labelled,
    _whole,
    check_stop_strings,
)
from guard_vllm.frontend.request_labels import GivenLabels, LabelMiddleware, is_over_http
from guard_vllm.labels import LabelError, LabelSources, check_labels
from guard_vllm.request_facts import ENFORCE, LABELS, facts_of
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMError

from tools.fuzz.mutation import JSON, edited, edits, mostly
from tools.fuzz.part import Outcome, Part, Parts

POLICIES: Final = ("restricted-chemistry", "tiny")
_KEY: Final = b"key-of-acme"
_KEYS: Final = "key-of-acme: {tenant: acme}\n"
_HEADERS: Final = {"tenant": "x-tenant", "tier": "X-Tier"}

VLLM_REFUSED: Final = Outcome(False, "refused by vLLM")
LABELS_REFUSED: Final = Outcome(False, "LabelError, as 400")

_MESSAGES: Final = [{"role": "user", "content": "hi"}]
_BODIES: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "chat": (ChatCompletionRequest, {"model": "m", "messages": _MESSAGES}),
    "completions": (CompletionRequest, {"model": "m", "prompt": "hi"}),
    "responses": (ResponsesRequest, {"model": "m", "input": "hi"}),
}

_XARGS_KEYS: Final = st.one_of(
    st.just(ENFORCE),
    st.sampled_from(
        [
            *(
                LABELS,
                MARK,
                "moe_guard_day",
                "moe_guard_label",
                "MOE_GUARD_ENFORCE",
                " moe_guard_enforce",
            ),
            *(
                "moe_guard_enforce\0",
                "session_id",
                "",
                "moe_guard\u200b_labels",
                "moe_guard_" + "x" * 500,
            ),
        ]
    ),
    st.text(max_size=4),
)
_NAMES: Final = st.lists(
    mostly(st.sampled_from(POLICIES), st.sampled_from(["tinny", "", "*", "\ud800", "TINY", "x" * 300])),
    max_size=3,
)
_XARGS: Final = mostly(
    st.dictionaries(_XARGS_KEYS, mostly(_NAMES, JSON), max_size=2),
    st.one_of(JSON, st.just({LABELS: {"tenant": "evil"}}), st.just({LABELS: ["tenant", "evil"]})),
)
_STOPS: Final = st.one_of(
    st.none(),
    st.just(["\n"]),
    st.lists(st.sampled_from(["moe_guard:a/b", "moe_guard", "moe_guardian"])),
)
_IDS: Final = st.one_of(
    st.just("1"), st.text(max_size=6), st.sampled_from(["x" * 512, "x" * 513, "a\nb", "\x1b[2J", "é"])
)
_VALUES: Final = st.one_of(
    st.sampled_from([b"acme", b"", b" ", b"\xff", b"a\tb", b"x" * 300, b"\xc2\x85", b"\xad", b"a\0b"]),
    st.binary(max_size=4),
)
_HEADER: Final = mostly(
    st.one_of(
        st.tuples(st.just(b"x-tenant"), _VALUES),
        st.tuples(st.just(b"x-tier"), _VALUES),
        st.tuples(
            st.just(b"authorization"),
            st.sampled_from(
                [b"Bearer key-of-acme", b"bearer  key-of-acme ", b"Basic x", b"", b"Bearer"]
            ),
        ),
    ),
    st.tuples(st.sampled_from([b"X-TENANT", b"x_tenant", b"moe_guard_labels", b"cookie"]), _VALUES),
)


class Request(NamedTuple):
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    request_id: str


def requests(body: dict[str, Any]) -> st.SearchStrategy[Request]:
    optional = {"stop": _STOPS, "n": st.integers(0, 2), "temperature": JSON}
    more = st.fixed_dictionaries({"vllm_xargs": _XARGS}, optional=optional)
    whole = more.map(lambda found: json.dumps({**body, **found}).encode())
    damaged = st.builds(
        lambda content, edit: edited(content, [edit]), whole, edits([b'"moe_guard":', b"["])
    )
    return st.builds(Request, mostly(whole, damaged), st.lists(_HEADER, max_size=3).map(tuple), _IDS)


class _Engine:
    """In the place of vLLM's: counts what reaches it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, str]] = []

    def generate(self, prompt: object, sampling_params: Any, request_id: str) -> None:
        self.seen.append((sampling_params, request_id))


def parts(folder: Path) -> Parts:
    (folder / "keys.yaml").touch(0o600)
    (folder / "keys.yaml").write_text(_KEYS)
    labels = LabelSources.of_settings(_HEADERS, str(folder / "keys.yaml"))
    sources = Sources({}, POLICIES, lambda: True, redact=False, labels=labels)
    made = {}
    for name, (model, body) in _BODIES.items():
        engine = _Engine()
        made[name] = Part(
            requests(body),
            _reader(model, engine, sources),
            (RequestArgumentError, LabelError),
            partial(_state, engine),
        )
    return made


def _state(engine: _Engine) -> object:
    return len(engine.seen), is_over_http()


def _reader(model: Any, engine: _Engine, sources: Sources) -> Callable[[Request], Outcome | None]:
    generate = _whole(_labelled(_Engine.generate, sources), _Engine.generate, sources)

    def read(request: Request) -> Outcome | None:
        answered: list[int] = []
        came: list[Outcome | None] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert is_over_http()
            try:
                params = _sampling_params(model, request.body)
            except (ValueError, VLLMError):  # vLLM's own words, of which it makes a 400
                came.append(VLLM_REFUSED)
                return
            generate(engine, "hi", params, request_id=request.request_id)
            came.append(None)

        async def send(message: Any) -> None:
            answered.append(message.get("status", 0))

        scope = {"type": "http", "headers": list(request.headers)}
        asyncio.run(LabelMiddleware(app, sources)(scope, None, send))
        assert not is_over_http(), "the labels outlive their request"
        if answered:
            assert answered[0] == 400
            return LABELS_REFUSED
        if came[0] is None:
            _check(*engine.seen[-1], request, sources)
        return came[0]

    return read


def _sampling_params(model: Any, body: bytes) -> Any:
    """As vLLM makes them of a body: FastAPI parses it with `json`, pydantic checks it."""
    try:
        document = json.loads(body)
    except RecursionError as error:  # FastAPI answers with a 400
        raise ValueError("nested too deep") from error
    return model.model_validate(document).to_sampling_params(16, {})


def _check(params: Any, request_id: str, request: Request, sources: Sources) -> None:
    """What the engine got. Raises AssertionError."""
    given = dict(params.extra_args or {})
    own = {key: value for key, value in given.items() if str(key).startswith(MARK)}
    assert set(own) <= {ENFORCE, LABELS}
    assert set(own.get(ENFORCE, [])) <= set(POLICIES)
    expected = sources.labels.labels_of(request.headers)
    assert own.get(LABELS, {}) == expected
    assert not expected or isinstance(own[LABELS], GivenLabels)
    has_key = any(name == b"authorization" and _KEY in value for name, value in request.headers)
    assert not has_key or expected["tenant"] == "acme", "the key's label wins"
    check_labels(own.get(LABELS, {}))
    check_stop_strings(params.stop or [])
    assert request_id.isprintable()
    assert len(request_id) <= MAX_ID_CHARACTERS
    facts_of(request_id, params, None)
