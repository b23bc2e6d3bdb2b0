"""A mask that a rule puts on while a request runs holds from the next token on, and not before."""

from __future__ import annotations

import pytest

from tests.integration.offline.cases import BLOCK_SIZE
from tests.integration.offline.engines import Engines
from tests.integration.offline.reading import decisions, flagged, rows, text

pytestmark = pytest.mark.vllm

MODES = ("eager", "v2")
PROMPT_TOKENS, OUTPUT_TOKENS = 40, 30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1])
def test_it_changes_nothing_up_to_the_position_that_fired_and_all_after_it(
    engines: Engines, mode: str, number: int
) -> None:
    case = engines.case(f"{mode}-guarded", "main", "midway")
    output = case["batches"][0][number]
    plain = engines.case(f"{mode}-plain", "plain", "midway")["batches"][0][number]
    [fired] = decisions(case, output, "late")
    assert fired["outcome"] == "masked"
    # The forward at the position that fired gives this many tokens; the next one is masked.
    given = fired["position"] - PROMPT_TOKENS + 2
    assert 1 < given < OUTPUT_TOKENS - 10, "it shall come on in the middle"
    tokens, logprobs = text(output["samples"][0])
    plain_tokens, plain_logprobs = text(plain["samples"][0])
    assert tokens[:given] == plain_tokens[:given]
    assert logprobs[:given] == plain_logprobs[:given]
    assert logprobs[given] != plain_logprobs[given]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1])
def test_no_masked_expert_is_selected_after_it_came_on(
    engines: Engines, mode: str, number: int
) -> None:
    case = engines.case(f"{mode}-guarded", "main", "midway")
    output = case["batches"][0][number]
    [fired] = decisions(case, output, "late")
    judged = rows(case, output)
    at_firing = [row for row in judged if row[0] == fired["position"]]
    assert flagged(at_firing) > 0
    after = [row for row in judged if row[0] > fired["position"]]
    assert len(after) > 10
    assert flagged(after) == 0
    # Another policy's rule on the single token was true before, and is false for good.
    positions = [d["position"] for d in decisions(case, output, "watch", "used-now")]
    assert positions
    assert max(positions) <= fired["position"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1])
def test_blocks_that_hold_masked_positions_are_not_reused(
    engines: Engines, mode: str, number: int
) -> None:
    case = engines.case(f"{mode}-guarded", "main", "midway")
    plain = engines.case(f"{mode}-plain", "plain", "midway")
    [fired] = decisions(case, case["batches"][0][number], "late")
    [again], [plain_again] = case["batches"][1 + number], plain["batches"][1 + number]
    assert plain_again["cached"] == (PROMPT_TOKENS + OUTPUT_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again["cached"] == (fired["position"] + 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again["cached"] < plain_again["cached"]
