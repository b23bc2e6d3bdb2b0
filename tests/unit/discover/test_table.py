"""Which tokens of which prompts count, and what they add up to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guard.discover.errors import DiscoverError
from guard.discover.table import Choice, PromptTable, read_table
from guard.policy.model import Phase
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest, TraceHeader
from guard.trace.writer import TraceWriter

TOPOLOGY = Topology("TinyForCausalLM", (MoELayer(1, 4, 2), MoELayer(3, 4, 2)))
CHOICE = Choice("bad", "benign")


def request(
    label: str, pair: str | None, experts: list[int], *, prompt: int = 2, category: str = "c"
) -> TracedRequest:
    """Each position chooses that expert and the next one, with weights of 0.75 and 0.25."""
    first = np.array([0] * prompt + experts)
    ids = np.stack([first, (first + 1) % 4], axis=-1)[:, None].repeat(2, axis=1).astype(np.int32)
    weights = np.broadcast_to(np.array([0.75, 0.25], np.float32), ids.shape).copy()
    labels = {"label": label, "category": category} | ({} if pair is None else {"pair_id": pair})
    return TracedRequest(Routing(ids, weights, prompt), labels=labels)


def table_of(folder: Path, requests: list[TracedRequest], choice: Choice = CHOICE) -> PromptTable:
    path = folder / f"{len(list(folder.iterdir()))}.moetrace"
    with TraceWriter(path, TraceHeader("tiny", TOPOLOGY)) as writer:
        for one in requests:
            writer.write(one)
    return read_table([path], choice)


def test_rates_and_masses_are_a_tokens_mean_over_the_output(tmp_path: Path) -> None:
    requests = [request("bad", "1", [0, 0, 0, 2]), request("benign", "1", [2, 2, 2, 2])]
    table = table_of(tmp_path, requests)
    assert table.experts_X[:5] == ((1, 0), (1, 1), (1, 2), (1, 3), (3, 0))
    assert table.rates_NX[0].tolist() == [0.75, 0.75, 0.25, 0.25] * 2
    assert table.masses_NX is not None
    assert table.masses_NX[0].tolist() == [0.5625, 0.1875, 0.1875, 0.0625] * 2
    assert table.is_target_N.tolist() == [True, False]
    assert table.tokens_N.tolist() == [4, 4]


def test_the_longer_answer_of_a_pair_is_cut_to_the_shorter_one(tmp_path: Path) -> None:
    requests = [request("bad", "1", [0] * 5), request("benign", "1", [2] * 5 + [1] * 20)]
    table = table_of(tmp_path, requests)
    assert table.tokens_N.tolist() == [5, 5]
    assert table.rates_NX[1, :4].tolist() == [0, 0, 1, 1]


def test_no_more_than_the_first_tokens_of_an_answer_count(tmp_path: Path) -> None:
    requests = [request("bad", "1", [0] * 9), request("benign", "1", [2] * 9)]
    table = table_of(tmp_path, requests, replace(CHOICE, first_tokens=6))
    assert table.tokens_N.tolist() == [6, 6]


def test_of_the_prompt_all_tokens_count(tmp_path: Path) -> None:
    requests = [request("bad", "1", [3] * 5, prompt=7), request("benign", "1", [3] * 5, prompt=4)]
    table = table_of(tmp_path, requests, replace(CHOICE, phase=Phase.PROMPT))
    assert table.tokens_N.tolist() == [7, 4]
    assert table.rates_NX[:, 0].tolist() == [1.0, 1.0]


def test_what_was_not_seen_or_has_no_weight_does_not_count(tmp_path: Path) -> None:
    own = request("bad", "1", [0, 0, 0, 0, 2, 2])
    weights = own.routing.topk_weights.copy()
    weights[4:, :, 1] = 0.0
    routing = own.routing._replace(topk_weights=weights, unseen=frozenset({2, 3}))
    requests = [replace(own, routing=routing), request("benign", "1", [0] * 6)]
    table = table_of(tmp_path, requests)
    assert table.tokens_N.tolist() == [4, 4]
    assert table.rates_NX[0, :4].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_a_pairs_difference_is_that_of_its_prompts_means(tmp_path: Path) -> None:
    requests = [
        request("bad", "1", [0] * 4),
        request("bad", "1", [2] * 4),
        request("benign", "1", [2] * 4),
        request("bad", "2", [0] * 4),
        request("benign", "2", [0] * 4),
    ]
    table = table_of(tmp_path, requests)
    difference_PX = table.differences(table.rates_NX)
    assert difference_PX[:, :4].tolist() == [[0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]]


def test_prompts_without_a_partner_or_with_few_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    requests = [
        request("bad", "1", [0] * 4),
        request("benign", "1", [0] * 4),
        request("bad", "2", [0] * 4),
        request("bad", None, [0] * 4),
        request("benign", "3", [0] * 2),
        request("other", "1", [0] * 4),
    ]
    table = table_of(tmp_path, requests)
    assert table.num_prompts == 2
    assert table.left_out == {
        "no partner of the other label": 2,
        "fewer than 4 tokens": 1,
        "label is neither of the two": 1,
    }


def test_without_pairs_nothing_is_compared_unless_that_is_asked_for(tmp_path: Path) -> None:
    requests = [request("bad", None, [0] * 8), request("benign", None, [0] * 8)]
    with pytest.raises(DiscoverError, match=r"have the same 'pair_id'.*--unpaired"):
        table_of(tmp_path, requests)
    unpaired = replace(CHOICE, is_paired=False, first_tokens=8)
    assert table_of(tmp_path, requests, unpaired).num_prompts == 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (replace(CHOICE, label="labels"), "no prompt has the label 'labels'; did you mean 'label'?"),
        (replace(CHOICE, target="baad"), "no prompt has label 'baad'; did you mean 'bad'?"),
        (replace(CHOICE, reference="x"), "no prompt has label 'x'; they have bad and benign"),
    ],
)
def test_a_label_that_no_prompt_has_is_refused_with_what_there_is(
    tmp_path: Path, choice: Choice, message: str
) -> None:
    requests = [request("bad", "1", [0] * 4), request("benign", "1", [0] * 4)]
    with pytest.raises(DiscoverError) as error:
        table_of(tmp_path, requests, choice)
    assert str(error.value) == message
