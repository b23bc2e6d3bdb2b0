"""One request made into several, or several into one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.attacks.asking import (
    ALLOWED_TOKENS,
    LONG_PROMPT,
    NOBODY,
    OUTPUT,
    PROMPT,
    REQUEST,
    complete,
    only_choice,
)
from tests.integration.attacks.policies import LIMIT_TOKENS

pytestmark = pytest.mark.vllm

START = list(range(10, 22))
"""A prompt of token ids."""


def grow(
    http: httpx.Client, headers: dict[str, str], step: int, rounds: int
) -> tuple[list[int], dict[str, Any]]:
    """Ask for `step` tokens again and again, each time with what came before as the prompt.

    What was gained, and the last choice.
    """
    gained: list[int] = []
    choice: dict[str, Any] = {}
    for _ in range(rounds):
        choice = only_choice(complete(http, headers, prompt=START + gained, max_tokens=step))
        gained += choice["token_ids"]
        if not choice["token_ids"]:
            break
    return gained, choice


def test_one_token_a_request_is_never_seen_by_a_window_of_the_output(http: httpx.Client) -> None:
    """Not defended: to a rule over `output` each of these requests is a new one with no output."""
    gained, last = grow(http, OUTPUT, step=1, rounds=10)
    assert len(gained) == 10
    assert last["finish_reason"] == "length"


def test_one_token_a_request_is_stopped_by_a_window_that_crosses_into_the_prompt(
    http: httpx.Client,
) -> None:
    gained, last = grow(http, REQUEST, step=1, rounds=60)
    assert len(START) + len(gained) == LIMIT_TOKENS
    assert last["finish_reason"] == "content_filter"
    assert last["stop_reason"] == "moe_guard:stop-request/fortieth"
    assert last["text"] == ""


def test_blocked_output_put_into_the_prompt_starts_a_new_window_of_the_output(
    http: httpx.Client,
) -> None:
    """Not defended: the same, with as many tokens as the rule lets pass at a time."""
    gained, last = grow(http, OUTPUT, step=12, rounds=4)
    assert last["finish_reason"] == "content_filter"
    assert len(gained) == 4 * ALLOWED_TOKENS


def test_blocked_output_put_into_the_prompt_gives_nothing_under_a_window_of_the_request(
    http: httpx.Client,
) -> None:
    gained, last = grow(http, REQUEST, step=100, rounds=4)
    assert len(START) + len(gained) == LIMIT_TOKENS
    assert (last["finish_reason"], last["token_ids"]) == ("content_filter", [])


@pytest.mark.parametrize("num_tokens", [LIMIT_TOKENS, 63, 64, 65, 200], ids=str)
def test_a_prompt_computed_in_chunks_is_blocked_as_one(http: httpx.Client, num_tokens: int) -> None:
    """The server computes at most 64 tokens a step."""
    prompt = [10 + number % 200 for number in range(num_tokens)]
    choice = only_choice(complete(http, LONG_PROMPT, prompt=prompt))
    assert choice["stop_reason"] == "moe_guard:stop-prompt/long"
    assert choice["token_ids"] == []


def test_a_blocked_prompt_among_others_changes_nothing_for_them(http: httpx.Client) -> None:
    long = PROMPT * 4
    short = ["a short one", "another"]
    alone = [only_choice(complete(http, LONG_PROMPT, prompt=prompt)) for prompt in short]
    together = complete(http, LONG_PROMPT, prompt=[short[0], long, short[1]])
    first, blocked, last = together["choices"]
    assert (blocked["finish_reason"], blocked["token_ids"]) == ("content_filter", [])
    assert [first["token_ids"], last["token_ids"]] == [choice["token_ids"] for choice in alone]
    assert first["finish_reason"] == last["finish_reason"] == "length"


def test_many_requests_at_once_are_each_judged_for_itself(http: httpx.Client) -> None:
    """32 prompts for 16 places: they wait, and take slots that others have left."""
    prompts = [PROMPT[:length] for length in range(1, 17)]
    free = complete(http, NOBODY, prompt=prompts)["choices"]
    blocked = complete(http, OUTPUT, prompt=prompts * 2)["choices"]
    for number, choice in enumerate(blocked):
        assert choice["finish_reason"] == "content_filter"
        assert choice["token_ids"] == free[number % 16]["token_ids"][:ALLOWED_TOKENS]
