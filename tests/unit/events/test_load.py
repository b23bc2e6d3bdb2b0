"""The numbers of a layer's use of experts, against loops that follow the formulas to the letter."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.events.load import (
    ExpertCounts,
    LayerCounts,
    LoadWindow,
    baseline_of,
    decode_counts,
    encode_counts,
    layer_load,
    layer_loads,
)
from guard.events.message import LayerLoad, Load, decode, encode

counts = st.lists(st.integers(0, 10**12), min_size=1, max_size=12)


def entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)


@given(counts, st.data())
def test_the_figures_are_those_of_the_formulas(selected: list[int], data: st.DataObject) -> None:
    rates = data.draw(
        st.lists(st.floats(0, 1e3), min_size=len(selected), max_size=len(selected))
        | st.just([0.0] * len(selected))
    )
    known = sum(rates)
    q = [rate / known if known else 0.0 for rate in rates]
    load = layer_load(7, np.array(selected), np.array(q))

    total = sum(selected)
    if total == 0:
        assert load is None
        return
    assert load is not None
    p = [count / total for count in selected]
    assert load.layer == 7
    assert load.effective_experts == pytest.approx(1 / sum(share * share for share in p))
    assert load.entropy_nats == pytest.approx(entropy(p), abs=1e-12)
    assert load.max_share == pytest.approx(max(p))
    if not any(q):
        assert load.divergence_nats is None
        return
    # By entropies: H(m) - (H(p) + H(q)) / 2.
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = entropy(mean) - (entropy(p) + entropy(q)) / 2
    assert load.divergence_nats == pytest.approx(expected, abs=1e-9)
    assert load.divergence_nats is not None
    assert 0 <= load.divergence_nats <= math.log(2)


@pytest.mark.parametrize(
    ("selected", "shares", "expected"),
    [
        ([5, 5, 5, 5], [0.25] * 4, (4.0, math.log(4), 0.25, 0.0)),
        ([9, 0, 0, 0], [0.0, 0.5, 0.5, 0.0], (1.0, 0.0, 1.0, math.log(2))),
        ([2, 2, 0, 0], None, (2.0, math.log(2), 0.5, None)),
    ],
    ids=["even", "apart", "no-profile"],
)
def test_what_they_are_at_their_ends(
    selected: list[int], shares: list[float] | None, expected: tuple[float | None, ...]
) -> None:
    load = layer_load(0, np.array(selected), None if shares is None else np.array(shares))
    assert load is not None
    for found, wanted in zip(msgspec.structs.astuple(load)[1:], expected, strict=True):
        assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-12))


def test_layers_have_the_models_own_numbers_and_unused_ones_are_left_out() -> None:
    counts_LE = np.array([[1, 1], [0, 0], [3, 0]])
    assert [load.layer for load in layer_loads((3, 5, 9), counts_LE)] == [3, 9]


def test_the_baseline_of_a_layer_is_the_first_one_that_knows_it() -> None:
    nobody, first, second = [0.0, 0.0], [0.25, 0.75], [0.5, 0.5]
    shares_ZLE = np.array([[nobody, first, nobody], [second, second, nobody]])
    found = baseline_of(shares_ZLE)
    assert found is not None
    assert found.tolist() == [second, first, nobody]
    assert baseline_of(np.zeros((0, 3, 2))) is None
    assert baseline_of(np.zeros((1, 3, 2))) is None


def test_a_window_holds_what_came_since_the_last_one_that_got_out() -> None:
    window = LoadWindow(2, (3, 5), 2)
    first, second = np.array([[4, 0], [2, 2]]), np.array([[4, 6], [2, 2]])

    assert window.summary(0, np.zeros((2, 2), dtype=np.int64), None) is None
    told = window.summary(4, first, None)
    assert window.summary(4, first, None) == told, "it did not get out"
    window.close(4, first)
    assert window.summary(4, first, None) is None
    later = window.summary(10, second, None)

    assert told is not None
    assert later is not None
    assert (told.engine, told.tokens, len(told.layers)) == (2, 4, 2)
    assert later == Load(2, 6, (LayerLoad(3, 1.0, 0.0, 1.0),))


def test_messages_and_counts_come_out_as_they_went_in() -> None:
    load = Load(1, 6, (LayerLoad(3, 1.0, 0.0, 1.0), LayerLoad(4, 2.0, 0.5, 0.5, 0.125)))
    assert decode(encode(load)) == load
    counted = ExpertCounts(6, 8, [LayerCounts(3, [6, 0], load.layers[0]), LayerCounts(4, [0, 0])])
    assert decode_counts(encode_counts(counted)) == counted
    with pytest.raises(msgspec.DecodeError):
        decode_counts(b"garbage")
