"""What one caller left in the cache neither hides a prompt from a rule nor crosses a mask."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.attacks.asking import LONG_PROMPT, MASKED, NOBODY, complete, only_choice
from tests.integration.attacks.conftest import BLOCK_TOKENS

pytestmark = pytest.mark.vllm

NUM_TOKENS = 6 * BLOCK_TOKENS + 5


def prompt(seed: int) -> list[int]:
    """One that no other test has sent."""
    return [10 + (seed * 7 + number * (seed + 3)) % 200 for number in range(NUM_TOKENS)]


def cached(answer: dict[str, Any]) -> int:
    details = answer["usage"]["prompt_tokens_details"] or {}
    return int(details.get("cached_tokens") or 0)


def shown(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    choice = only_choice(answer)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_a_prompt_computed_for_somebody_without_rules_is_still_judged(http: httpx.Client) -> None:
    """Hope: what is not computed again is not seen."""
    tokens = prompt(1)
    first = complete(http, NOBODY, prompt=tokens)
    assert only_choice(first)["finish_reason"] == "length"
    second = complete(http, LONG_PROMPT, prompt=tokens)
    assert cached(second) >= 5 * BLOCK_TOKENS
    assert only_choice(second)["stop_reason"] == "moe_guard:stop-prompt/long"
    assert only_choice(second)["token_ids"] == []


@pytest.mark.parametrize(
    ("one", "other"), [(MASKED, NOBODY), (NOBODY, MASKED)], ids=["masked first", "unmasked first"]
)
def test_kv_under_a_mask_is_not_taken_without_it_nor_the_reverse(
    http: httpx.Client, one: dict[str, str], other: dict[str, str]
) -> None:
    """Hope: half a prompt without the mask. With a salt of its own a request shares no block at all."""
    tokens = prompt(2 if one is MASKED else 3)
    own = shown(complete(http, other, prompt=tokens, logprobs=0, cache_salt="alone"))
    before = complete(http, one, prompt=tokens, logprobs=0)
    after = complete(http, other, prompt=tokens, logprobs=0)
    assert cached(after) == 0
    assert shown(after) == own
    assert shown(before) != own, "the mask changes nothing here, so this shows nothing"
    assert cached(complete(http, other, prompt=tokens)) >= 5 * BLOCK_TOKENS


def test_a_salt_of_the_callers_does_not_join_masked_and_unmasked(http: httpx.Client) -> None:
    tokens = prompt(4)
    complete(http, MASKED, prompt=tokens, cache_salt="the same")
    assert cached(complete(http, NOBODY, prompt=tokens, cache_salt="the same")) == 0
