"""What `moe-guard record` keeps of a trace that vLLM's worker wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from guard_vllm.record_offline import Answered, TokensError, keep

from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest, TraceHeader
from guard.trace.reader import TraceReader
from guard.trace.writer import TraceWriter

TOPOLOGY = Topology("TestMoe", (MoELayer(0, 8, 2),))
PROMPT, POSITIONS = 3, 6


def kept(folder: Path, num_tokens: int, *, with_tokens: bool = True) -> TracedRequest:
    """Of a request with that many tokens, of its prompt and answer."""
    ids = np.arange(2 * POSITIONS).reshape(POSITIONS, 1, 2).astype(np.int32) % 8
    routing = Routing(ids, np.full(ids.shape, 0.5, np.float32), PROMPT, 1, frozenset({2, 5}))
    served, out = folder / "served.moetrace", folder / "out.moetrace"
    with TraceWriter(served, TraceHeader("m", TOPOLOGY)) as writer:
        writer.write(TracedRequest(routing, "7-abcdef", 2.0))
    answered = {"7": Answered(4, {"label": "a"}, np.arange(100, 100 + num_tokens, dtype=np.int32))}
    keep([served], out, answered, with_tokens=with_tokens)
    (request,) = TraceReader(out)
    return request


def test_a_request_has_its_prompts_place_and_labels_and_the_tokens_that_were_fed_back(
    tmp_path: Path,
) -> None:
    request = kept(tmp_path, POSITIONS + 1)
    assert (request.request_id, request.labels, request.time) == ("5", {"label": "a"}, 2.0)
    assert request.token_ids is not None
    assert request.token_ids.tolist() == [100, 101, 102, 103, 104, 105]
    assert len(request.routing.topk_ids) == POSITIONS


def test_of_a_request_whose_last_token_was_withheld_all_tokens_count(tmp_path: Path) -> None:
    request = kept(tmp_path, POSITIONS)
    assert request.token_ids is not None
    assert request.token_ids.tolist() == [100, 101, 102, 103, 104, 105]


def test_positions_that_no_token_of_the_answer_has_are_cut_off(tmp_path: Path) -> None:
    request = kept(tmp_path, POSITIONS - 2)
    assert request.token_ids is not None
    assert request.token_ids.tolist() == [100, 101, 102, 103]
    assert len(request.routing.topk_ids) == len(request.routing.topk_weights) == 4
    assert (request.routing.first_seen, request.routing.unseen) == (1, frozenset({2}))


def test_without_being_asked_for_no_tokens_are_kept_and_nothing_is_cut(tmp_path: Path) -> None:
    request = kept(tmp_path, POSITIONS - 2, with_tokens=False)
    assert request.token_ids is None
    assert len(request.routing.topk_ids) == POSITIONS


def test_a_prompt_of_fewer_tokens_than_were_routed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokensError, match="prompt 5: vLLM names 2 tokens where the prompt has 3"):
        kept(tmp_path, PROMPT - 1)
