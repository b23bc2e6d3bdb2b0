"""A block ends a request at the token that it was decided at, and shows nothing of that token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.offline.cases import BLOCK_VARIANTS
from tests.integration.offline.engines import PLACES, Engines
from tests.integration.offline.policies import STOP_AT
from tests.integration.offline.reading import Case, counter, decisions
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")
PROMPT_TOKENS = 24
SHOWN = {"n": "n > 1", "logprobs": "log probabilities"}


def _outputs(case: Case, variant: str) -> dict[str, Any]:
    [output] = case["batches"][list(BLOCK_VARIANTS).index(variant)]
    found: dict[str, Any] = output
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_output_is_a_strict_prefix_that_ends_where_the_evidence_says(
    engines: Engines, mode: str, variant: str, support_record: SupportRecord
) -> None:
    if variant in SHOWN:
        support_record.feature(SHOWN[variant], runner=PLACES[mode][0])
    case = engines.case(f"{mode}-guarded", "main", "blocks")
    output = _outputs(case, variant)
    plain = _outputs(engines.case(f"{mode}-plain", "plain", "blocks"), variant)
    fired = decisions(case, output, "stop")
    assert len(fired) == len(output["samples"])
    lengths = []
    for sample, whole in zip(output["samples"], plain["samples"], strict=True):
        given = len(sample["tokens"])
        lengths.append(given)
        assert 0 < given < len(whole["tokens"])
        assert sample["tokens"] == whole["tokens"][:given]
        assert sample["logprobs"] == whole["logprobs"][:given]
        assert sample["finish_reason"] == "content_filter"
        assert sample["stop_reason"] == "moe_guard:stop/block"
    # The position that fired is the last token given; what was sampled behind it is withheld.
    assert sorted(lengths) == sorted(d["position"] - PROMPT_TOKENS + 1 for d in fired)
    assert {d["outcome"] for d in fired} == {"blocked"}
    [evidence] = fired[0]["evidence"]
    assert evidence["value"] >= evidence["threshold"] == STOP_AT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_a_block_in_the_prompt_gives_no_token(engines: Engines, mode: str, variant: str) -> None:
    case = engines.case(f"{mode}-guarded", "main", "prompt-blocks")
    output = _outputs(case, variant)
    for sample in output["samples"]:
        assert sample["tokens"] == []
        assert sample["logprobs"] == []
        assert sample["finish_reason"] == "content_filter"
        assert sample["stop_reason"] == "moe_guard:stop-prompt/block"
    fired = decisions(case, output, "stop-prompt")
    assert len(fired) == len(output["samples"])
    for decision in fired:
        assert decision["phase"] == "prompt"
        assert decision["position"] < PROMPT_TOKENS - 1, "decided on the way, acted on at the end"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["blocks", "prompt-blocks"])
def test_each_sample_counts_as_one_blocked_request(engines: Engines, mode: str, name: str) -> None:
    case = engines.case(f"{mode}-guarded", "main", name)
    samples = sum(len(output["samples"]) for [output] in case["batches"])
    assert counter(case, "requests_total", outcome="blocked") == samples
    assert counter(case, "requests_total") == samples
