"""Experts that only follow the words are told from those that do not."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from guard.cli.discover_report import print_report
from guard.discover.discovery import Demands, Discovery, discover
from guard.discover.report import html_report
from guard.discover.same_token import SameToken, coverage
from guard.discover.summary import summary
from guard.discover.table import Choice, read_table
from guard.policy.model import Phase
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest, TraceHeader
from guard.trace.writer import TraceWriter
from tests.support.planted_words import PlantedWords

CHOICE = Choice("target", "benign")
QUICK = Demands(flips=300, resamples=50, shuffles=4)
TINY = Topology("TinyForCausalLM", (MoELayer(1, 4, 2), MoELayer(3, 6, 3)))
LOSE = "These experts mostly follow the words, not what is meant by them"


def write(
    path: Path, topology: Topology, requests: Iterable[TracedRequest], *, tokens: bool = True
) -> Path:
    with TraceWriter(path, TraceHeader("tiny", topology, tokens=tokens)) as writer:
        for request in requests:
            writer.write(request)
    return path


def found_in(folder: Path, planted: PlantedWords, *, tokens: bool = True) -> Discovery:
    path = write(folder / "a.moetrace", planted.topology, planted.requests(), tokens=tokens)
    return discover(read_table([path], CHOICE), QUICK)


def same_of(found: Discovery) -> SameToken:
    assert found.controls.same_token is not None
    return found.controls.same_token


def test_where_only_the_words_differ_the_same_tokens_show_nothing_and_the_verdict_says_so(
    tmp_path: Path,
) -> None:
    found = found_in(tmp_path, PlantedWords(tilt=0.8))
    same, flagged_X = same_of(found), found.flagged_X
    assert flagged_X.sum() > 5
    assert np.abs(found.effects.effect_X[flagged_X]).min() >= 0.1
    assert np.abs(same.effect_X[flagged_X]).max() < 0.05
    assert same.share == 1.0
    assert LOSE in found.verdict


def test_where_the_words_are_alike_the_same_tokens_show_the_whole_effect(tmp_path: Path) -> None:
    planted = PlantedWords(effect=3.0)
    found = found_in(tmp_path, planted)
    assert set(planted.planted_experts) <= set(found.experts)
    flagged_X = found.flagged_X
    np.testing.assert_allclose(
        same_of(found).effect_X[flagged_X], found.effects.effect_X[flagged_X], atol=0.03
    )
    assert "words" not in found.verdict


def test_planted_experts_stand_out_on_the_same_tokens_though_the_words_differ_too(
    tmp_path: Path,
) -> None:
    planted = PlantedWords(tilt=0.8, effect=3.0)
    found = found_in(tmp_path, planted)
    column_of = {expert: x for x, expert in enumerate(found.table.experts_X)}
    planted_X = np.zeros(len(column_of), np.bool_)
    planted_X[[column_of[expert] for expert in planted.planted_experts]] = True
    effect_X = same_of(found).effect_X
    assert effect_X[planted_X].min() > 0.15
    # An expert that is raised displaces others a little, on each token.
    assert np.abs(effect_X[~planted_X]).max() < 0.15


def drawn(seed: int) -> list[TracedRequest]:
    """Of several lengths, with positions that were not seen and experts without weight."""
    generator = np.random.default_rng(seed)
    requests = []
    for number in range(24):
        prompt, output = int(generator.integers(2, 7)), int(generator.integers(0, 20))
        positions = prompt + output
        ids = np.full((positions, 2, 3), -1, np.int32)
        for position in range(positions):
            ids[position, 0, :2] = generator.permutation(4)[:2]
            ids[position, 1] = generator.permutation(6)[:3]
        weights = generator.random(ids.shape, dtype=np.float32) * (generator.random(ids.shape) < 0.9)
        routing = Routing(
            ids,
            weights.astype(np.float32),
            prompt,
            first_seen=int(generator.integers(2)),
            unseen=frozenset(generator.integers(1, positions, 2).tolist()),
        )
        label = ("target", "benign", "target", "other")[number % 4]
        token_ids = generator.integers(12, size=positions).astype(np.int32) + 50_000
        labels = {"label": label, "pair_id": f"{number // 8}"}
        requests.append(TracedRequest(routing, labels=labels, token_ids=token_ids))
    return requests


def by_hand(requests: Sequence[TracedRequest], choice: Choice) -> tuple[np.ndarray, float]:
    """The same from its definition, position by position."""
    counted: list[tuple[TracedRequest, list[int]]] = []
    for request in requests:
        routing = request.routing
        last = len(routing.topk_ids)
        first = routing.num_prompt_tokens if choice.phase is Phase.OUTPUT else 0
        if choice.phase is Phase.PROMPT:
            last = min(last, routing.num_prompt_tokens)
        own = [position for position in range(first, last) if routing.is_seen(position)]
        if choice.phase is Phase.OUTPUT:
            own = own[: choice.first_tokens]
        if request.labels["label"] != "other" and len(own) >= 4:
            counted.append((request, own))
    hits: dict[tuple[int, str], np.ndarray] = defaultdict(lambda: np.zeros(10))
    number: dict[tuple[int, str], int] = defaultdict(int)
    for request, own in counted:
        pair = [
            (other.labels["label"], len(other_own))
            for other, other_own in counted
            if other.labels["pair_id"] == request.labels["pair_id"]
        ]
        if len({label for label, _ in pair}) < 2:
            continue
        if choice.phase is Phase.OUTPUT:
            own = own[: min(length for _, length in pair)]
        assert request.token_ids is not None
        for position in own:
            key = int(request.token_ids[position]), request.labels["label"]
            number[key] += 1
            for layer in range(2):
                for k in range(3):
                    expert = int(request.routing.topk_ids[position, layer, k])
                    if expert >= 0 and request.routing.topk_weights[position, layer, k] > 0:
                        hits[key][4 * layer + expert] += 1
    effect, total, covered = np.zeros(10), 0, 0
    for token in {token for token, _ in number}:
        one, other = number[token, "target"], number[token, "benign"]
        if one and other:
            rates = hits[token, "target"] / one, hits[token, "benign"] / other
            effect += min(one, other) * (rates[0] - rates[1])
            total += min(one, other)
            covered += one + other
    return effect / total, covered / sum(number.values())


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("seed", range(4))
def test_the_effect_is_the_one_that_is_defined(tmp_path: Path, seed: int, phase: Phase) -> None:
    requests, choice = drawn(seed), replace(CHOICE, phase=phase, first_tokens=9)
    path = write(tmp_path / "a.moetrace", TINY, requests)
    same = read_table([path], choice).same_token
    assert same is not None
    effect_X, share = by_hand(requests, choice)
    np.testing.assert_allclose(same.effect_X, effect_X, atol=1e-12)
    assert same.share == pytest.approx(share)


def test_traces_without_tokens_are_not_compared_and_the_report_says_how_to_get_them(
    tmp_path: Path,
) -> None:
    found = found_in(tmp_path, PlantedWords(tilt=0.8), tokens=False)
    assert found.controls.same_token is None
    assert "words" not in found.verdict
    report = report_of(found)
    assert report["controls"]["sameTokenShare"] is None
    assert {one["sameTokenEffect"] for one in report["experts"]} == {None}
    for text in (printed(report), html_report([report])):
        assert "`moe-guard record --tokens` keeps them" in text


def test_one_trace_without_tokens_is_enough_not_to_compare(tmp_path: Path) -> None:
    planted = PlantedWords(pairs=8)
    paths = [
        write(tmp_path / f"{tokens}.moetrace", planted.topology, planted.requests(), tokens=tokens)
        for tokens in (True, False)
    ]
    assert read_table(paths, CHOICE).same_token is None
    assert read_table(paths[:1], CHOICE).same_token is not None


def test_the_report_has_the_effect_of_each_flagged_expert_and_what_it_rests_on(tmp_path: Path) -> None:
    found = found_in(tmp_path, PlantedWords(effect=3.0))
    report, same = report_of(found), same_of(found)
    column_of = {expert: x for x, expert in enumerate(found.table.experts_X)}
    assert report["controls"]["sameTokenShare"] == 1.0
    for one in report["experts"]:
        effect = same.effect_X[column_of[one["layer"], one["expert"]]]
        assert one["sameTokenEffect"] == pytest.approx(effect, abs=1e-4)
        assert f"{one['sameTokenEffect']:+.3f}" in printed(report)
    assert "same tokens" in printed(report)
    page = html_report([report])
    assert "target less reference, same tokens" in page
    for text in (printed(report), page):
        assert "Tokens that occur under both labels cover 100% of the positions." in text


def test_words_that_no_two_labels_share_are_no_ground_for_a_verdict(tmp_path: Path) -> None:
    found = found_in(tmp_path, PlantedWords(tilt=1.0))
    same = same_of(found)
    assert same.share == 0.0
    assert np.isnan(same.effect_X).all()
    assert "words" not in found.verdict
    report = report_of(found)
    assert {one["sameTokenEffect"] for one in report["experts"]} == {None}
    assert "cover 0% of the positions: too few to conclude anything" in printed(report)


@pytest.mark.parametrize(
    ("effect", "same", "share", "warns"),
    [
        ([0.2, 0.2, 0.2], [0.09, 0.09, 0.2], 1.0, True),
        ([0.2, 0.2, 0.2], [0.09, 0.11, 0.2], 1.0, False),
        ([-0.2, -0.2, 0.2], [-0.15, -0.15, 0.0], 1.0, False),
        ([0.2, 0.2, 0.2], [-0.2, -0.2, 0.2], 1.0, True),
        ([0.2, 0.2, 0.2], [0.0, 0.0, 0.0], 0.09, False),
        ([0.2, 0.2, 0.2], [0.0, 0.0, 0.0], 0.1, True),
    ],
    ids=["most", "few", "lowered", "the other way", "hardly any tokens", "just enough"],
)
def test_the_verdict_rests_on_the_median_ratio(
    effect: list[float], same: list[float], share: float, warns: bool
) -> None:
    flagged_X = np.array([True, True, True, False])
    control = SameToken(np.array([*same, 9.0]), share)
    assert bool(control.warning(np.array([*effect, 1.0]), flagged_X)) is warns


def test_nothing_flagged_is_nothing_to_warn_of() -> None:
    assert SameToken(np.zeros(3), 1.0).warning(np.ones(3), np.zeros(3, np.bool_)) == ""


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "hold no token ids"), (0.08, "too few"), (0.834, "83% of the positions.")],
)
def test_what_it_rests_on_is_said(share: float | None, text: str) -> None:
    assert text in coverage(share)


def report_of(found: Discovery) -> dict[str, Any]:
    return summary(found, CHOICE, None, {})


def printed(report: dict[str, Any]) -> str:
    file = io.StringIO()
    print_report(Console(file=file, width=200), report)
    return file.getvalue()
