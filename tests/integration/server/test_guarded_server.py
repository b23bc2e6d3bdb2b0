"""One real server, real policies, the real client: what each sees of a request that is acted on."""

from __future__ import annotations

import stat
from typing import Any

import openai
import pytest

from tests.integration.server.conftest import RED_KEY, Server
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

PROMPT = "the quick brown fox"
LOG_FIELDS = {
    *("decision_id", "time", "revision", "policy", "rule", "mode", "action", "severity"),
    *("request_id", "model", "phase", "position", "evidence", "unseen_tokens", "exempt", "outcome"),
}


def enforcing(*policies: str, **more: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"moe_guard_enforce": list(policies)}, "ignore_eos": True, **more}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2},
        {"logit_bias": {"70": 100, "71": 99}},
        {"n": 3, "temperature": 0.9},
        {"extra": {"min_tokens": 12}},
        {"extra": {"structured_outputs": {"regex": "[a-z]{12}"}}},
    ],
    ids=["plain", "logprobs", "logit_bias", "n", "min_tokens", "structured"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_block_ends_each_completion_with_the_tokens_before_it(
    server: Server, options: dict[str, Any], stream: bool, support_record: SupportRecord
) -> None:
    if stream:
        support_record.feature("streamed output", runner="v1")
    if "structured_outputs" in options.get("extra", {}):
        support_record.feature("structured output", runner="v1")
    options = dict(options)
    extra = enforcing("stop-output", return_token_ids=True, **options.pop("extra", {}))
    reply: Any = server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=12,
        stream=stream,
        extra_body=extra,
        **{"temperature": 0, **options},
    )
    chunks = list(reply) if stream else [reply]
    for index in range(options.get("n", 1)):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert choices[-1].finish_reason == "content_filter"
        assert choices[-1].stop_reason == "moe_guard:stop-output/third"
        assert sum(len(c.token_ids or ()) for c in choices) == 3
        if "logprobs" in options:
            assert sum(len(c.logprobs.tokens) for c in choices if c.logprobs) == 3


def test_a_blocked_completion_is_the_beginning_of_the_unblocked_one(server: Server) -> None:
    def complete(*policies: str) -> Any:
        reply: Any = server.client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            extra_body=enforcing(*policies, return_token_ids=True),
        )
        return reply

    blocked, free = complete("stop-output"), complete()
    assert free.choices[0].finish_reason == "length"
    assert free.choices[0].token_ids[:3] == blocked.choices[0].token_ids
    assert blocked.usage.completion_tokens == 3


def test_a_block_in_the_prompt_gives_no_token_at_all(server: Server) -> None:
    reply: Any = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, extra_body=enforcing("stop-prompt")
    )
    assert reply.choices[0].finish_reason == "content_filter"
    assert reply.choices[0].text == ""
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_blocked_chat_carries_the_rules_message_as_refusal(server: Server, stream: bool) -> None:
    reply: Any = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=12,
        temperature=0,
        stream=stream,
        extra_body=enforcing("stop-output"),
    )
    choice = list(reply)[-1].choices[0] if stream else reply.choices[0]
    told = choice.delta if stream else choice.message
    assert choice.finish_reason == "content_filter"
    assert told.refusal == "This request was stopped by policy."


def test_the_first_block_in_deciding_order_names_the_reason(server: Server) -> None:
    reply: Any = server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=12,
        extra_body=enforcing("stop-output", "stop-prompt"),
    )
    assert reply.choices[0].stop_reason == "moe_guard:stop-prompt/any"


def test_a_request_cannot_name_a_policy_that_does_not_exist(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'stop-output'"):
        server.client.completions.create(
            model="tiny", prompt=PROMPT, extra_body=enforcing("stop-outputs")
        )


def test_a_masked_request_is_answered_and_never_uses_the_masked_experts(server: Server) -> None:
    selections = {"policy": "reroute", "set": "some"}
    name = "moe_guard_expert_selections_total"
    before = server.metric(name, **selections)
    masked = server.metric("moe_guard_requests_total", outcome="masked")
    server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, extra_body=enforcing("reroute")
    )
    server.wait_for(lambda: server.metric("moe_guard_requests_total", outcome="masked") == masked + 1)
    assert server.metric(name, **selections) == before
    server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, extra_body=enforcing())
    server.wait_for(lambda: server.metric(name, **selections) > before)


def test_metrics_count_each_request_and_each_token_once(server: Server) -> None:
    server.wait_for(lambda: server.metric("moe_guard_masked_requests", policy="reroute") == 0)

    def scrape() -> tuple[float, ...]:
        return (
            server.metric("moe_guard_requests_total"),
            server.metric("moe_guard_requests_total", outcome="observed"),
            server.metric("moe_guard_tokens_evaluated_total", phase="output"),
            server.metric("moe_guard_decisions_total", policy="watch", mode="enforce"),
        )

    before = scrape()
    reply: Any = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, n=2, extra_body=enforcing()
    )
    assert reply.usage is not None
    server.wait_for(lambda: server.metric("moe_guard_requests_total") == before[0] + 2)
    # The last token of each is never fed back, so never routed.
    assert scrape() == (before[0] + 2, before[1] + 2, before[2] + 2 * 7, before[3] + 2)


def test_the_guard_shows_itself_live_with_its_revision(server: Server) -> None:
    assert server.metric("moe_guard_up") == 1
    assert server.metric("moe_guard_blind_layers") == 0
    assert (
        server.metric(
            "moe_guard_program_info", policies="stop-output,stop-prompt,reroute,by-tenant,watch"
        )
        == 1
    )
    assert server.metric("moe_guard_failures_total") == 0


def test_a_rule_acts_on_the_tenants_it_names_and_an_exception_holds_it_back(server: Server) -> None:
    def ended(tenant: str | None, key: str = "none") -> tuple[str, str | None, list[Any]]:
        reply: Any = server.client.with_options(api_key=key).completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=4,
            extra_body=enforcing(),
            extra_headers={} if tenant is None else {"x-tenant": tenant},
        )
        server.wait_for(
            lambda: (
                any(d["policy"] == "watch" for d in server.decisions(reply.id))
                or reply.choices[0].finish_reason == "content_filter"
            )
        )
        fired = [d for d in server.decisions(reply.id) if d["policy"] == "by-tenant"]
        [choice] = reply.choices
        outcomes = [(d["exempt"], d["mode"], d["outcome"]) for d in fired]
        return choice.finish_reason, choice.stop_reason, outcomes

    blocked = ("content_filter", "moe_guard:by-tenant/first")
    exempt = ("length", None, [(True, "audit", "observed")])
    assert ended("blue")[:2] == blocked
    assert ended("red") == exempt
    assert ended("blue", RED_KEY) == exempt, "the key's label wins"
    assert ended("green") == ended(None) == ("length", None, [])


def test_the_decision_log_says_what_was_decided_and_nothing_of_the_text(server: Server) -> None:
    reply: Any = server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        extra_body=enforcing("stop-output"),
    )
    server.wait_for(lambda: any(d["outcome"] == "blocked" for d in server.decisions(reply.id)))
    blocked = next(d for d in server.decisions(reply.id) if d["outcome"] == "blocked")
    assert set(blocked) == {*LOG_FIELDS, "chain"}
    assert (blocked["policy"], blocked["rule"]) == ("stop-output", "third")
    assert (blocked["mode"], blocked["action"], blocked["phase"]) == ("enforce", "block", "output")
    assert blocked["evidence"] == [{"condition": "count", "value": 12.0, "threshold": 12.0}]
    assert blocked["position"] == reply.usage.prompt_tokens + 2
    audited = [d for d in server.decisions(reply.id) if d["policy"] == "stop-prompt"]
    assert [(d["mode"], d["outcome"]) for d in audited] == [("audit", "observed")]
    assert PROMPT not in server.decision_log.read_text()
    assert stat.S_IMODE(server.decision_log.stat().st_mode) == 0o600


def test_several_api_servers_show_the_same_counts_at_every_scrape(
    two_api_servers: Server, support_record: SupportRecord
) -> None:
    support_record.feature("several API servers", runner="v1")
    server = two_api_servers
    blocked = 12
    for _ in range(blocked):
        reply: Any = server.client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, extra_body=enforcing("stop-output")
        )
        assert reply.choices[0].finish_reason == "content_filter"
        assert reply.choices[0].stop_reason == "moe_guard"
    server.wait_for(lambda: server.metric("moe_guard_requests_total") == blocked)
    for _ in range(6):
        assert server.metric("moe_guard_requests_total", outcome="blocked") == blocked
        assert server.metric("moe_guard_up") == 1
    assert len([d for d in server.decisions("cmpl") if d["outcome"] == "blocked"]) == blocked
