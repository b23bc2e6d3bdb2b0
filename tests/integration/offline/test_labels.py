"""Labels that a program gives: exceptions, rules for some requests alone, and samples of requests."""

from __future__ import annotations

from typing import Any

import pytest

from guard.program.applicability import in_sample
from tests.integration.offline.cases import CACHED_TOKENS
from tests.integration.offline.engines import Engines
from tests.integration.offline.policies import SAMPLES
from tests.integration.offline.reading import decisions, flagged, rows

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")


def _case(engines: Engines, mode: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The case, and its requests of the same text: red, of no tenant, red, red that enforces, blue."""
    case = engines.case(f"{mode}-guarded", "labelled", "labelled")
    return case, [batch[0] for batch in case["batches"][:5]]


@pytest.mark.parametrize("mode", MODES)
def test_an_exempt_request_is_logged_and_not_masked(engines: Engines, mode: str) -> None:
    case, outputs = _case(engines, mode)
    masks = [decisions(case, output, "mask-but-red") for output in outputs]

    assert [[(d["exempt"], d["mode"], d["outcome"]) for d in found] for found in masks] == [
        [(True, "audit", "observed")],
        [(False, "enforce", "masked")],
        [(True, "audit", "observed")],
        [(False, "enforce", "masked")],  # it asked for it
        [(False, "enforce", "masked")],
    ]
    assert [flagged(rows(case, output)) > 0 for output in outputs] == [True, False, True, False, False]


@pytest.mark.parametrize("mode", MODES)
def test_an_exempt_request_shares_no_blocks_with_masked_ones(engines: Engines, mode: str) -> None:
    _, outputs = _case(engines, mode)
    assert [output["cached"] for output in outputs] == [
        0,
        0,
        CACHED_TOKENS,  # those of the first, which was exempt too
        CACHED_TOKENS,  # those of the second
        CACHED_TOKENS,
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_rule_blocks_only_requests_that_it_matches(engines: Engines, mode: str) -> None:
    case, outputs = _case(engines, mode)

    assert [len(decisions(case, output, "stop-blue")) for output in outputs] == [0, 0, 0, 0, 1]
    [blue] = outputs[-1]["samples"]
    assert (blue["stop_reason"], len(blue["tokens"])) == ("moe_guard:stop-blue/block", 1)
    assert [len(output["samples"][0]["tokens"]) for output in outputs[:4]] == [24] * 4


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_is_chosen_by_the_engines_request_id(engines: Engines, mode: str) -> None:
    case, _ = _case(engines, mode)
    requests = [output for batch in case["batches"] for output in batch]
    internal = {req_id.rpartition("-")[0]: req_id for req_id in case["rows"]}

    for output in requests:
        fired = {d["rule"] for d in decisions(case, output, "sampled")}
        req_id = internal[output["request_id"]]
        assert fired == {name for name, share in SAMPLES.items() if in_sample(req_id, share)}
