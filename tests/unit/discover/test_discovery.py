"""Experts that were planted are found, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from guard.discover.discovery import Demands, discover
from guard.discover.errors import DiscoverError
from guard.discover.probe import fit_probe
from guard.discover.table import Choice, PromptTable, read_table
from guard.trace.format import TraceHeader
from guard.trace.writer import TraceWriter
from tests.support.planted_trace import Planted

PLANTED = Planted()
QUICK = Demands(flips=300, resamples=50, shuffles=0)


@cache
def table_of(planted: Planted) -> PromptTable:
    with TemporaryDirectory() as folder:
        path = Path(folder, "planted.moetrace")
        with TraceWriter(path, TraceHeader("planted", planted.topology)) as writer:
            for request in planted.requests():
                writer.write(request)
        return read_table([path], Choice("target", "benign"))


def shuffled(table: PromptTable, seed: int) -> PromptTable:
    """Each pair's labels in an order that is drawn."""
    generator = np.random.default_rng(seed)
    swap = {pair: bool(generator.integers(2)) for pair in set(table.pairs_N)}
    return replace(table, is_target_N=table.is_target_N ^ [swap[pair] for pair in table.pairs_N])


def test_all_planted_experts_are_found_and_at_most_one_more() -> None:
    found = discover(table_of(PLANTED))
    assert set(PLANTED.planted_experts) <= set(found.experts)
    assert len(found.experts) <= len(PLANTED.planted_experts) + 1
    assert "6 of 384 experts meet all demands" in found.verdict or len(found.experts) == 7


def test_with_labels_shuffled_within_pairs_nothing_is_found_in_95_of_100_runs() -> None:
    table = table_of(PLANTED)
    runs = [discover(shuffled(table, seed), QUICK) for seed in range(100)]
    assert sum(not run.flagged_X.any() for run in runs) >= 95


def test_a_test_that_takes_tokens_for_independent_finds_many_even_in_shuffled_labels() -> None:
    controls = discover(table_of(PLANTED), QUICK).controls
    assert controls.naive > 4 * PLANTED.planted
    assert controls.naive_shuffled > 4 * PLANTED.planted


def test_where_nothing_is_planted_the_verdict_says_that_there_is_no_signal() -> None:
    found = discover(table_of(Planted(planted=0)), QUICK)
    assert found.experts == []
    assert found.verdict.startswith("No signal: of 384 experts none meets all demands")


def test_experts_that_topics_move_further_are_found_but_not_recommended() -> None:
    found = discover(table_of(Planted(effect=1.0, topic=2.5)), QUICK)
    assert found.experts
    assert "topics differ more" in found.verdict


def test_every_effect_is_within_its_interval_and_a_planted_one_excludes_zero() -> None:
    found = discover(table_of(PLANTED), QUICK)
    effects = found.effects
    assert ((effects.low_X <= effects.effect_X) & (effects.effect_X <= effects.high_X)).all()
    assert (effects.low_X[found.flagged_X] > 0).all()


def test_prompts_without_pairs_are_compared_by_prompt() -> None:
    table = table_of(PLANTED)
    found = discover(replace(table, pairs_N=("",) * table.num_prompts), QUICK)
    assert found.num_pairs == PLANTED.pairs
    assert set(PLANTED.planted_experts) <= set(found.experts)


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(DiscoverError, match="7 pairs are too few"):
        discover(table_of(Planted(pairs=7)))


def test_the_probe_separates_labels_in_categories_that_it_never_saw() -> None:
    probe = fit_probe(table_of(PLANTED))
    assert probe.quality.in_domain is not None
    assert probe.quality.in_domain > 0.95
    assert set(probe.quality.held_out) == {f"topic-{n}" for n in range(4)}
    assert probe.quality.worst_held_out is not None
    assert 0.8 < probe.quality.worst_held_out < probe.quality.in_domain


def test_a_probe_of_noise_is_worth_nothing() -> None:
    probe = fit_probe(table_of(Planted(planted=0)))
    assert probe.quality.in_domain is not None
    assert abs(probe.quality.in_domain - 0.5) < 0.15


def test_the_probe_is_the_one_that_a_policy_evaluates() -> None:
    table = table_of(PLANTED)
    probe = fit_probe(table)
    scores_N = table.rates_NX @ probe.weights_X + probe.bias
    assert ((scores_N > 0) == table.is_target_N).mean() > 0.95
