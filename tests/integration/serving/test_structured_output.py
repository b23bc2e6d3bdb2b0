"""Structured output under masks and blocks, also with drafts: the output obeys its grammar, and the
grammar has advanced by the tokens that were given and by no other."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.integration.offline.reading import Case, counter, flagged, rows
from tests.integration.serving.judging import Output, decided
from tests.integration.serving.lives import (
    GRAMMARS,
    STRUCTURED_ASKED,
    WAYS,
    LifeEngines,
    cases_of,
)
from tests.support.byte_tokenizer import text_of

pytestmark = pytest.mark.vllm

STRUCTURED = [
    (group, way)
    for group, way in WAYS
    if any(case["name"] == "structured" for case in cases_of(group, way))
]
DRAFTING = [(group, way) for group, way in STRUCTURED if "ngram" in way]


def _read(engines: LifeEngines, group: str, way: str) -> tuple[Case, list[list[Output]]]:
    """A case, and its outputs by grammar and by what was asked."""
    case = engines.case(group, way, "structured")
    [batch] = case["batches"]
    width = len(STRUCTURED_ASKED)
    return case, [batch[i * width : (i + 1) * width] for i in range(len(GRAMMARS))]


def _obeys(grammar: dict[str, Any], text: str) -> bool:
    if "regex" in grammar:
        return re.fullmatch(grammar["regex"], text) is not None
    if "choice" in grammar:
        return text in grammar["choice"]
    found = json.loads(text)
    return (
        found.keys() == {"ok", "kind", "list"}
        and isinstance(found["ok"], bool)
        and found["kind"] in ("first", "second")
        and [type(item) for item in found["list"]] == [bool, bool]
    )


def _sample(output: Output) -> dict[str, Any]:
    [sample] = output["samples"]
    found: dict[str, Any] = sample
    return found


@pytest.mark.parametrize(("group", "way"), STRUCTURED)
def test_what_runs_to_its_end_obeys_its_grammar_masked_or_not(
    life_engines: LifeEngines, group: str, way: str
) -> None:
    _, by_grammar = _read(life_engines, group, way)
    for grammar, outputs in zip(GRAMMARS, by_grammar, strict=True):
        for output, asked in zip(outputs, STRUCTURED_ASKED, strict=True):
            if asked != ["stop"]:
                assert _sample(output)["finish_reason"] == "stop"
                assert _obeys(grammar, text_of(_sample(output)["tokens"]))


@pytest.mark.parametrize(("group", "way"), STRUCTURED)
def test_a_blocked_one_ends_inside_its_grammar_without_an_error(
    life_engines: LifeEngines, group: str, way: str
) -> None:
    """It has given the beginning of what the same request gives unblocked, up to the block."""
    case, by_grammar = _read(life_engines, group, way)
    for outputs in by_grammar:
        blocked = outputs[STRUCTURED_ASKED.index(["stop"])]
        whole = outputs[STRUCTURED_ASKED.index([])]
        given, uncut = _sample(blocked)["tokens"], _sample(whole)["tokens"]
        assert _sample(blocked)["finish_reason"] == "content_filter"
        assert 0 < len(given) < len(uncut)
        assert given == uncut[: len(given)]
        [position] = [p for _, rule, p, _ in decided(case, blocked) if rule == "stop"]
        assert position == len(blocked["prompt"]) + len(given) - 1


@pytest.mark.parametrize(("group", "way"), STRUCTURED)
def test_a_grammar_advances_by_the_tokens_given_and_not_by_withdrawn_ones(
    life_engines: LifeEngines, group: str, way: str
) -> None:
    _, by_grammar = _read(life_engines, group, way)
    for output in (output for outputs in by_grammar for output in outputs):
        assert output["num_in_grammar"] == len(_sample(output)["tokens"])


@pytest.mark.parametrize(("group", "way"), STRUCTURED)
def test_masked_rows_choose_no_masked_expert(life_engines: LifeEngines, group: str, way: str) -> None:
    case, by_grammar = _read(life_engines, group, way)
    for outputs in by_grammar:
        masked, free = (
            [row[:2] for row in rows(case, outputs[STRUCTURED_ASKED.index(asked)])]
            for asked in (["isolate"], [])
        )
        assert len(masked) > 30
        assert flagged(masked) == 0
        assert flagged(free) > 0


@pytest.mark.parametrize(("group", "way"), DRAFTING)
def test_drafts_are_accepted_and_rejected_under_grammars(
    life_engines: LifeEngines, group: str, way: str
) -> None:
    case, _ = _read(life_engines, group, way)
    drafted, accepted = (
        counter(case, f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted")
    )
    assert 0 < accepted < drafted


def test_drafts_change_neither_output_nor_decisions(life_engines: LifeEngines) -> None:
    fast, drafted = _read(life_engines, "lives", "ngram")
    plain, expected = _read(life_engines, "lives", "steady")
    for outputs, wanted in zip(drafted, expected, strict=True):
        for output, want in list(zip(outputs, wanted, strict=True))[:3]:  # the last is masked midway
            assert _sample(output)["tokens"] == _sample(want)["tokens"]
            assert decided(fast, output) == decided(plain, want)
