"""What a blocked request, the metrics and the admin API tell of prompts, outputs and keys; and that a
caller who leaves is counted."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.integration.attacks.asking import (
    CHAT,
    COMPLETIONS,
    LONG_PROMPT,
    MASKED,
    NOBODY,
    OUTPUT,
    body_of,
    complete,
    only_choice,
    parts_of,
    post,
)
from tests.integration.attacks.conftest import ADMIN_KEY, RED_KEY
from tests.integration.server.conftest import Server

pytestmark = pytest.mark.vllm

LONG = "my secret question is " * 3
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def told(prompt_logprobs: list[Any] | None) -> list[Any]:
    return [entry for entry in prompt_logprobs or () if entry is not None]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_echo_does_not_read_the_answer_to_a_blocked_prompt(
    http: httpx.Client, max_tokens: int, stream: bool
) -> None:
    """Hope: among the log probabilities of one token more is what the model would have said."""
    fields = {"prompt": LONG, "max_tokens": max_tokens, "logprobs": 5, "echo": True, "stream": stream}
    fields["return_token_ids"] = False
    for headers, some in ((NOBODY, True), (LONG_PROMPT, False)):
        answer = post(http, COMPLETIONS, headers, body_of(COMPLETIONS, **fields))
        assert answer.status_code == 200, answer.text
        given = [c["logprobs"] for part in parts_of(answer) for c in part["choices"]]
        known = [p for logprobs in given if logprobs for p in logprobs["top_logprobs"] if p is not None]
        assert bool(known) is some
        ends = [c["finish_reason"] for part in parts_of(answer) for c in part["choices"]]
        assert ("content_filter" in ends) is not some


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_do_not_read_the_answer_to_a_blocked_prompt(http: httpx.Client, n: int) -> None:
    more = {"prompt_logprobs": 5, "n": n, "temperature": 0.9}
    chat = body_of(CHAT, messages=[{"role": "user", "content": LONG}], **more)
    tokens = {"token_ids": [7] * 60, "sampling_params": {"max_tokens": 5, "prompt_logprobs": 5}}
    for headers, some in ((NOBODY, True), (LONG_PROMPT, False)):
        completion = complete(http, headers, prompt=LONG, **more)
        for choice in completion["choices"]:
            assert bool(told(choice["prompt_logprobs"])) is some
        assert bool(told(post(http, CHAT, headers, chat).json()["prompt_logprobs"])) is some
        generated = post(http, "/inference/v1/generate", headers, tokens).json()
        assert bool(told(generated["prompt_logprobs"])) is some


def test_prompt_logprobs_read_on_where_only_the_output_is_judged(http: httpx.Client) -> None:
    """Not defended: as with one token a request, the answer is read in prompts."""
    choice = only_choice(complete(http, OUTPUT, prompt=LONG, prompt_logprobs=1))
    assert choice["finish_reason"] == "content_filter"
    assert len(told(choice["prompt_logprobs"])) == len(LONG) - 1


def series(http: httpx.Client) -> set[str]:
    lines = http.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if line.startswith("moe_guard_")}


def test_names_that_callers_make_up_make_no_series(http: httpx.Client, server: Server) -> None:
    """Hope: the metrics grow until Prometheus or the server gives up."""

    def ended() -> float:
        return server.metric("moe_guard_requests_total")

    for headers in (OUTPUT, LONG_PROMPT, MASKED, NOBODY):
        complete(http, headers)
        complete(http, headers, prompt=LONG)
    before, since = series(http), ended()
    num_requests = 40
    for number in range(num_requests):
        name = f"{number}-{'x' * 100}"
        headers = {"x-tenant": name, "x-team": name, "x-request-id": name, "user-agent": name}
        complete(http, headers, max_tokens=4, user=name, cache_salt=name)
    server.wait_for(lambda: ended() >= since + num_requests)
    assert series(http) == before


def test_neither_metrics_nor_events_nor_logs_hold_text_or_keys(
    http: httpx.Client, server: Server
) -> None:
    secrets = ("zanzibar", ADMIN_KEY, RED_KEY)
    prompt = f"the {secrets[0]} question " * 3
    keyed = {"authorization": f"Bearer {RED_KEY}"}
    said = [
        only_choice(complete(http, headers | keyed, prompt=prompt, structured_outputs=letters))["text"]
        for headers in (OUTPUT, LONG_PROMPT, MASKED)
        for letters in [{"regex": "[a-z]{12}"}]
    ]
    events = "/guard/v1/events"
    server.wait_for(lambda: len(http.get(events, headers=ADMIN).json()["events"]) > 0)
    pages = [http.get("/metrics").text]
    for path in ("status", "policies", "events", "experts", "masks"):
        assert http.get(f"/guard/v1/{path}").status_code == 401
        answer = http.get(f"/guard/v1/{path}", headers=ADMIN)
        assert answer.status_code == 200, answer.text
        pages.append(answer.text)
    pages += [server.decision_log.read_text(), server.log.read_text(errors="replace")]
    for page in pages:
        for secret in (*secrets, *(text for text in said if len(text) > 8)):
            assert secret not in page


def test_events_hold_ids_and_numbers_alone(http: httpx.Client, server: Server) -> None:
    done = complete(http, OUTPUT)
    server.wait_for(lambda: bool(server.decisions(done["id"])))
    for event in server.decisions(done["id"]):
        text = json.dumps(event["evidence"])
        assert re.fullmatch(r'[\[\]{}", :.\w+-]*', text)
        assert set(event["evidence"][0]) == {"condition", "value", "threshold"}


@pytest.mark.parametrize("num_chunks", [0, 1, 3], ids=["at once", "at the first", "in the middle"])
def test_a_caller_who_leaves_is_counted_once_and_its_mask_is_released(
    http: httpx.Client, server: Server, num_chunks: int
) -> None:
    """Hope: a request that is never finished is never accounted for."""

    def ended() -> float:
        return server.metric("moe_guard_requests_total")

    before = ended()
    body = body_of(COMPLETIONS, stream=True, max_tokens=400, prompt=LONG)
    with http.stream("POST", COMPLETIONS, json=body, headers=MASKED) as answer:
        lines = answer.iter_lines()
        for _ in range(2 * num_chunks):
            next(lines)
    server.wait_for(lambda: ended() >= before + 1)
    server.wait_for(lambda: server.metric("moe_guard_masked_requests", policy="reroute") == 0)
    assert ended() == before + 1
