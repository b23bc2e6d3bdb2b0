"""What is known of a vLLM request, and that engine core and workers know the same."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm import request_facts
from guard_vllm.request_facts import facts_of, facts_of_request, rules_of_request, send_day
from vllm.sampling_params import SamplingParams

from guard.policy import parse_policies
from guard.program.applicability import RequestFacts, RulesByFacts
from guard.program.compile import compile_policies
from tests.unit.device.driving import BLOCK, COUNT, TOPOLOGY, policy_text, rule_text

TODAY = date(2027, 3, 31)
LORA = SimpleNamespace(lora_name="tuned")


@pytest.fixture(autouse=True)
def _today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_facts, "utc_today", lambda: TODAY)


def request(params: SamplingParams | None, lora: Any = None) -> Any:
    return SimpleNamespace(request_id="cmpl-a", sampling_params=params, lora_request=lora)


def test_a_request_that_asks_for_nothing_is_known_by_its_id() -> None:
    assert facts_of("a", None, None) == RequestFacts("a", today=TODAY)
    assert facts_of("a", SamplingParams(), None) == RequestFacts("a", today=TODAY)


def test_labels_adapter_and_enforced_policies_are_facts() -> None:
    extra_args = {"moe_guard_labels": {"tenant": "a"}, "moe_guard_enforce": ["p"], "other": 1}
    assert facts_of("a", SamplingParams(extra_args=extra_args), LORA) == RequestFacts(
        "a", {"tenant": "a"}, "tuned", TODAY, frozenset({"p"})
    )


def test_the_day_of_the_engine_core_goes_to_the_workers_and_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = SamplingParams(extra_args={"moe_guard_labels": {"tenant": "a"}})
    one = request(shared, LORA)
    facts = facts_of_request(one)
    monkeypatch.setattr(request_facts, "utc_today", lambda: date(2027, 4, 1))  # midnight has passed
    send_day(one)

    assert facts_of(one.request_id, one.sampling_params, one.lora_request) == facts
    assert facts_of_request(one) == facts
    assert "moe_guard_day" not in (shared.extra_args or {}), "other requests may have the same"
    assert one.sampling_params.max_tokens == shared.max_tokens


def test_rules_are_derived_once_for_each_set() -> None:
    labelled = "{labels: {tenant: a}}"
    text = policy_text(rule_text(COUNT, BLOCK, rest=f", match: {labelled}"))
    program = compile_policies(parse_policies(text), TOPOLOGY)
    one = request(SamplingParams(extra_args={"moe_guard_labels": {"tenant": "a"}}))

    found = rules_of_request(one, "first", RulesByFacts(program.rules))
    assert found.enforced_R.tolist() == [True]
    assert rules_of_request(one, "first", RulesByFacts(())) is found
    assert rules_of_request(one, "second", RulesByFacts(())).enforced_R.tolist() == []
