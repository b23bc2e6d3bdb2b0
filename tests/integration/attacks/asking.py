"""What a caller sends, as one of the tenants of `policies`, and what it is shown, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT = "the quick brown fox"
"""19 tokens: each is a byte."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

OUTPUT = {"x-tenant": "output"}  # blocked at the third output token
REQUEST = {"x-tenant": "request"}  # blocked at the fortieth token of prompt and output
LONG_PROMPT = {"x-tenant": "prompt"}  # blocked at the end of a prompt of forty tokens
MASKED = {"x-tenant": "masked"}
SAMPLED = {"x-tenant": "sampled"}  # half of the requests are blocked
NOBODY: dict[str, str] = {}  # no rule acts on it

ALLOWED_TOKENS = 3
"""Of the output of the tenant `output`."""


@dataclass
class Choice:
    """One choice as a client puts it together."""

    finish_reason: str | None = None
    stop_reason: object = None
    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    refusal: str | None = None
    has_tool_calls: bool = False


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    said = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [user(PROMPT)]}
    base = {"model": "tiny", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return base | said | {"return_token_ids": True} | fields


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def post(
    http: httpx.Client, path: str, headers: Mapping[str, str], body: Mapping[str, Any]
) -> httpx.Response:
    return http.post(path, json=body, headers=dict(headers))


def complete(http: httpx.Client, headers: Mapping[str, str], **fields: Any) -> dict[str, Any]:
    """The whole answer of the completions API."""
    answer = post(http, COMPLETIONS, headers, body_of(COMPLETIONS, **fields))
    assert answer.status_code == 200, answer.text
    done: dict[str, Any] = answer.json()
    return done


def only_choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    [choice] = answer["choices"]
    assert isinstance(choice, dict)
    return choice


def choices_of(answer: httpx.Response) -> list[Choice]:
    """Of a completion or a chat."""
    found: dict[int, Choice] = {}
    for part in parts_of(answer):
        for given in part["choices"]:
            choice = found.setdefault(given["index"], Choice())
            _add(choice, given)
    return [found[index] for index in sorted(found)]


def parts_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, or the one answer."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return [answer.json()]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def _add(choice: Choice, given: Mapping[str, Any]) -> None:
    said = given.get("delta") or given.get("message") or {}
    choice.finish_reason = given.get("finish_reason") or choice.finish_reason
    choice.stop_reason = given.get("stop_reason") or choice.stop_reason
    choice.token_ids += given.get("token_ids") or []
    choice.refusal = said.get("refusal") or choice.refusal
    choice.has_tool_calls = choice.has_tool_calls or bool(said.get("tool_calls"))
    logprobs = given.get("logprobs") or {}
    choice.num_logprobs += len(logprobs.get("tokens") or logprobs.get("content") or ())
