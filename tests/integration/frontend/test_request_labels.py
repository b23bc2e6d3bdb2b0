"""Labels of HTTP requests: from configured headers and API keys into the engine core, on every API."""

from __future__ import annotations

import ast
import json
import time
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.integration.frontend.asked import block

pytestmark = pytest.mark.vllm

REPORT = block(1, test_stop_reason="labels")
CHAT = [{"role": "user", "content": "hi"}]
RED = {"tenant": "red-team"}


def said(stop_reason: Any) -> Any:
    """The labels as they arrived, from what the stand-in reports."""
    assert isinstance(stop_reason, str)
    return ast.literal_eval(stop_reason.removeprefix("moe_guard:labels/"))


def completion(client: openai.OpenAI, **headers: str) -> Any:
    done = client.completions.create(
        model="tiny", prompt="hi", extra_body=REPORT, extra_headers=headers
    )
    return said(done.choices[0].stop_reason)  # type: ignore[attr-defined]


def test_a_configured_header_gives_a_label_whatever_its_case(client: openai.OpenAI) -> None:
    assert completion(client, **{"x-TENANT": "red-team"}) == RED
    assert completion(client, **{"x-tenant": "a", "X-Region": "eu"}) == {"tenant": "a", "region": "eu"}


def test_without_a_known_header_or_key_a_request_has_no_labels(client: openai.OpenAI) -> None:
    assert completion(client) is None
    assert completion(client, **{"x-other": "red-team", "x-tenant": ""}) is None


@pytest.mark.parametrize(
    ("key", "labels"),
    [
        ("sk-plain", RED),
        ("sk-hidden", {"tenant": "blue-team", "tier": "gold"}),
        ("sk-Plain", None),
    ],
    ids=["plain", "digest", "unknown"],
)
def test_an_api_key_gives_labels(client: openai.OpenAI, key: str, labels: Any) -> None:
    assert completion(client.with_options(api_key=key)) == labels


def test_a_forged_header_loses_against_the_key(client: openai.OpenAI) -> None:
    keyed = client.with_options(api_key="sk-hidden")
    found = completion(keyed, **{"x-tenant": "red-team", "x-region": "eu"})
    assert found == {"tenant": "blue-team", "tier": "gold", "region": "eu"}


def test_labels_arrive_over_chat_streamed_or_not_and_for_each_of_several_choices(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": CHAT,
        "extra_body": REPORT,
        "extra_headers": {"x-tenant": "red-team"},
    }
    answer = client.chat.completions.create(**asked, n=2)
    assert [said(choice.stop_reason) for choice in answer.choices] == [RED, RED]
    streamed = [
        said(choice.stop_reason)
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.finish_reason
    ]
    assert streamed == [RED]


def test_labels_arrive_for_each_prompt_of_a_completion_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["hi", "ho"],
        "extra_body": REPORT,
        "extra_headers": {"x-tenant": "red-team"},
    }
    answer = client.completions.create(**asked)
    assert [said(choice.stop_reason) for choice in answer.choices] == [RED, RED]
    streamed = [
        said(choice.stop_reason)
        for chunk in client.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.finish_reason
    ]
    assert streamed == [RED, RED]


def test_labels_arrive_over_messages(messages_client: anthropic.Anthropic) -> None:
    """Which say no stop reason either."""
    reasons = [
        messages_client.messages.create(
            model="tiny",
            max_tokens=5,
            messages=CHAT,  # type: ignore[arg-type]
            extra_body=block(1, test_only_tenant="red-team"),
            extra_headers={"x-tenant": tenant},
        ).stop_reason
        for tenant in ("red-team", "other")
    ]
    assert reasons == ["refusal", "max_tokens"]


@pytest.mark.parametrize("background", [False, True], ids=["waited for", "in the background"])
def test_labels_arrive_over_responses(http: httpx.Client, background: bool) -> None:
    """Which says no stop reason: the stand-in blocks only a request that has the label."""
    body = block(1, test_only_tenant="red-team")
    asked = {"model": "tiny", "input": "hi", "max_output_tokens": 3, "background": background, **body}
    statuses = []
    for headers in ({"x-tenant": "red-team"}, {"x-tenant": "other"}):
        answer = http.post("/v1/responses", json=asked, headers=headers).json()
        while answer["status"] in ("queued", "in_progress"):
            time.sleep(0.05)
            answer = http.get(f"/v1/responses/{answer['id']}").json()
        statuses.append((answer.get("incomplete_details") or {}).get("reason"))
    assert statuses == ["content_filter", "max_output_tokens"]


@pytest.mark.parametrize("headers", [{}, {"x-tenant": "red-team"}], ids=["alone", "beside a header"])
@pytest.mark.parametrize("value", ["tenant=red-team", ["red-team"]], ids=["text", "list"])
def test_a_label_in_the_body_is_a_400(
    http: httpx.Client, value: object, headers: dict[str, str]
) -> None:
    body = {"model": "tiny", "prompt": "hi", "vllm_xargs": {"moe_guard_labels": value}}
    answer = http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert "labels come from configured headers or API keys" in answer.text


def test_an_api_that_takes_sampling_parameters_as_they_are_takes_no_labels(http: httpx.Client) -> None:
    params = {"max_tokens": 2, "extra_args": {"moe_guard_labels": RED}}
    body = {"model": "tiny", "token_ids": [1, 2], "sampling_params": params}
    answer = http.post("/inference/v1/generate", json=body)
    assert answer.status_code == 400
    assert "labels come from configured headers or API keys" in answer.text


@pytest.mark.parametrize("name", ["x-tenant", "authorization"])
def test_a_header_that_is_there_twice_is_a_400_that_both_clients_understand(
    http: httpx.Client, name: str
) -> None:
    twice = [(name, "Bearer sk-plain"), (name, "Bearer sk-hidden")]
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "hi"}, headers=twice)
    assert answer.status_code == 400
    error = answer.json()
    assert f"the header '{name}' is there 2 times" in error["error"]["message"]
    assert error["type"] == "error"
    assert "sk-" not in json.dumps(error)


def test_a_value_that_is_too_long_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 256 characters"):
        completion(client, **{"x-tenant": "x" * 257})
