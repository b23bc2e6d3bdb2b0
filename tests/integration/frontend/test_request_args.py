"""What a request may ask of the guard, over HTTP; offline the same checks are in test_offline."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from guard_vllm.frontend.request_args import (
    RequestArgumentError,
    check_request_args,
    check_request_id,
    check_stop_strings,
)
from guard_vllm.labels import LabelError
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.frontend.asked import block

POLICIES = ("restricted-chemistry", "tiny")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}


@pytest.mark.parametrize(
    "extra_args",
    [None, {}, {"other": 1}, {"moe_guard_enforce": []}, {"moe_guard_enforce": list(POLICIES)}],
)
def test_what_may_be_asked_passes(extra_args: dict[str, object] | None) -> None:
    check_request_args(extra_args, POLICIES)


@pytest.mark.parametrize(
    ("extra_args", "said"),
    [
        ({"moe_guard_enforce": ["restricted-chemstry"]}, "did you mean 'restricted-chemistry'?"),
        ({"moe_guard_enforce": ["zzz"]}, "no policy 'zzz'; ask the operator"),
        ({"moe_guard_enforce": "tiny"}, "expected a list of policy names, found 'tiny'"),
        ({"moe_guard_enforce": [1]}, "expected a list"),
        ({"moe_guard_enforce": {"tiny": 1}}, "expected a list"),
        ({"moe_guard_enforce": None}, "expected a list"),
        ({"moe_guard_labels": "x"}, "labels come from configured headers or API keys"),
        ({"moe_guard_off": 1}, "can set only 'moe_guard_enforce'"),
        ({"moe_guard": 1}, "can set only 'moe_guard_enforce'"),
    ],
)
def test_anything_else_of_the_guards_is_refused(extra_args: dict[str, object], said: str) -> None:
    with pytest.raises(RequestArgumentError) as raised:
        check_request_args(extra_args, POLICIES)
    assert said in str(raised.value)


def test_a_program_that_calls_the_engine_itself_may_give_labels() -> None:
    check_request_args({"moe_guard_labels": {"tenant": "a"}}, POLICIES, trusted=True)
    with pytest.raises(LabelError, match="expected a mapping"):
        check_request_args({"moe_guard_labels": "tenant=a"}, POLICIES, trusted=True)
    with pytest.raises(RequestArgumentError, match="labels come from configured headers"):
        check_request_args({"moe_guard_labels": {"tenant": "a"}}, POLICIES)


def test_with_redaction_no_policy_is_named() -> None:
    with pytest.raises(RequestArgumentError) as raised:
        check_request_args({"moe_guard_enforce": ["restricted-chemstry"]}, POLICIES, redact=True)
    assert "restricted-chemistry" not in str(raised.value)


@given(st.text(max_size=12))
def test_only_stop_strings_that_read_like_a_block_are_refused(tail: str) -> None:
    check_stop_strings([f"x{tail}", f"moe_guardian{tail}"])
    with pytest.raises(RequestArgumentError):
        check_stop_strings(["\n", f"moe_guard:{tail}"])


@pytest.mark.parametrize("request_id", ["chatcmpl-1", "Überprüfung 7", "x" * 512, None, 7])
def test_an_id_that_can_be_printed_passes(request_id: object) -> None:
    check_request_id(request_id)


@given(st.text(max_size=8), st.sampled_from("\n\r\x00\x1b\x7f\x85\u2028\ud800"))
def test_an_id_with_something_else_in_it_is_refused(text: str, odd: str) -> None:
    with pytest.raises(RequestArgumentError, match="cannot be printed"):
        check_request_id(f"{text}{odd}{text}")


def test_an_id_of_any_length_is_refused() -> None:
    with pytest.raises(RequestArgumentError, match="513 characters are too many"):
        check_request_id("x" * 513)


def test_what_a_caller_sent_is_quoted_in_part() -> None:
    for extra_args in (
        {f"moe_guard_{'x' * 10_000}": 1},
        {"moe_guard_enforce": ["x" * 10_000]},
        {"moe_guard_enforce": "x" * 10_000},
    ):
        with pytest.raises(RequestArgumentError) as raised:
            check_request_args(extra_args, POLICIES)
        assert len(str(raised.value)) < 300


@pytest.mark.vllm
def test_enforced_policies_arrive_in_the_engine_core_as_a_list_of_str(http: httpx.Client) -> None:
    body = block(1, test_stop_reason="args", moe_guard_enforce=["restricted-chemistry", "tiny"])
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **body})
    reported = answer.json()["choices"][0]["stop_reason"]
    assert reported == "moe_guard:args/['restricted-chemistry', 'tiny']"


@pytest.mark.vllm
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_refused_argument_is_a_400_before_a_stream_is_opened(
    http: httpx.Client, path: str, stream: bool
) -> None:
    asked = {"vllm_xargs": {"moe_guard_enforce": ["tinny"]}, "stream": stream}
    answer = http.post(path, json={"model": "tiny", **BODIES[path], **asked})
    assert answer.status_code == 400
    assert "did you mean 'tiny'?" in json.dumps(answer.json(), ensure_ascii=False)


@pytest.mark.vllm
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_stop_string_that_reads_like_a_block_is_a_400(http: httpx.Client, path: str) -> None:
    field = "stop_sequences" if path == "/v1/messages" else "stop"
    answer = http.post(path, json={"model": "tiny", **BODIES[path], field: ["moe_guard:x"]})
    assert answer.status_code == 400
    assert "cannot be a stop string" in answer.text
