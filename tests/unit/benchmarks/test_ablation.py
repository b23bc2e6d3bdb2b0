"""The ablation study: what is masked, what chooses, and what is measured. Models are untrained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.ablation import choose, curves, study, twins
from benchmarks.ablation.choose import Method, activations, costs, orders
from benchmarks.ablation.curves import (
    SIDES,
    Curve,
    Meter,
    at_place,
    damage,
    interval,
    place_at,
    resampled,
    target_at,
    topic_losses,
)
from benchmarks.ablation.texts import BENIGN, FAMILIAR, TARGET, Corpus, corpus, loss_sums_D
from benchmarks.ablation.twins import Kind, build, load_tokenizer
from benchmarks.ablation.units import (
    Unit,
    ablated,
    down_parameters,
    first_of,
    layout,
    random_order,
    within_limit,
)
from demo import text
from demo import train as recipe
from demo.names import LEXICONS, Split
from guard.program.reference_routing import route
from guard.program.topology import Router

COUNTS = {TARGET: 4, **dict.fromkeys((*BENIGN, *FAMILIAR), 3)}
tokenizer = cache(load_tokenizer)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_of(kind: Kind) -> Any:
    torch.manual_seed(1)
    model = build(kind, tokenizer()).eval()
    model.set_experts_implementation("eager")  # which takes float64 too
    return model


@cache
def few(split: Split) -> Corpus:
    return corpus(split, tokenizer(), COUNTS)


def routed(model: Any, layer: int, states_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE, weights_TK, ids_TK = model.model.layers[layer].mlp.gate(states_TH)
    return logits_TE.detach(), weights_TK.detach(), ids_TK


def test_a_rerouted_expert_gets_no_token_and_the_next_best_comes_in_as_the_guard_has_it() -> None:
    model = model_of(Kind.PLAIN)
    states_TH = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    logits_TE, _, before_TK = routed(model, 1, states_TH)
    gone = torch.zeros(4, 16, dtype=torch.bool)
    gone[1, [3, 7, 11]] = True
    with ablated(model, Unit.REROUTED, gone):
        _, weights_TK, ids_TK = routed(model, 1, states_TH)
    assert gone[1][before_TK].any()
    assert not gone[1][ids_TK].any()
    for row in range(40):
        expected = route(
            logits_TE[row].tolist(), Router(scoring="softmax", renormalize=True), 2, rerouted=(3, 7, 11)
        )
        assert ids_TK[row].tolist() == [expert for expert, _ in expected]
        assert weights_TK[row].tolist() == pytest.approx([weight for _, weight in expected], rel=1e-5)


def test_a_dropped_expert_keeps_its_place_and_loses_its_weight() -> None:
    model = model_of(Kind.PLAIN)
    states_TH = torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    _, before_TK, chosen_TK = routed(model, 0, states_TH)
    gone = torch.zeros(4, 16, dtype=torch.bool)
    gone[0, 5] = True
    with ablated(model, Unit.DROPPED, gone):
        _, weights_TK, ids_TK = routed(model, 0, states_TH)
    assert torch.equal(ids_TK, chosen_TK)
    assert (chosen_TK == 5).any()
    assert torch.equal(weights_TK, before_TK * (chosen_TK != 5))


@pytest.mark.parametrize("kind", [Kind.PLAIN, Kind.DENSE])
def test_an_ablated_neuron_contributes_nothing_and_comes_back(kind: Kind) -> None:
    model = model_of(kind)
    batch, sizes = few(Split.CHOOSE).batches[0], layout(model)
    rates_LE = activations(model, few(Split.CHOOSE))[0].sum(0)
    expert = int(rates_LE[2].argmax())
    gone = torch.zeros(sizes.shape(Unit.NEURONS), dtype=torch.bool)
    gone[2, expert, 9] = True
    weight = (
        model.model.layers[2].mlp.experts.gate_up_proj.data[expert]
        if kind is Kind.PLAIN
        else model.model.layers[2].mlp.gate_proj.weight.data
    )
    own = weight[9].clone()

    def logits() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(batch.ids_BT, use_cache=False).logits
        return result

    def changed() -> Tensor:
        weight[9] = 5.0
        try:
            return logits()
        finally:
            weight[9] = own

    whole = logits()
    assert not torch.equal(changed(), whole)
    with ablated(model, Unit.NEURONS, gone):
        without = logits()
        assert not torch.equal(without, whole)
        assert torch.equal(changed(), without)
    assert torch.equal(logits(), whole)


def test_a_layer_keeps_as_many_experts_as_a_token_chooses() -> None:
    sizes = layout(model_of(Kind.PLAIN))
    order = within_limit(np.arange(64), sizes, Unit.REROUTED)
    gone = first_of(order, len(order), sizes, Unit.REROUTED)
    assert gone.sum(1).tolist() == [14] * 4


@pytest.mark.parametrize("unit", list(Unit))
def test_the_random_control_takes_as_many_units_as_the_choice(unit: Unit) -> None:
    model = model_of(Kind.PLAIN)
    sizes = layout(model)
    chosen = orders(model, few(Split.CHOOSE), [unit])[unit, Method.ACTIVATION]
    controls = [random_order(sizes, unit, seed) for seed in range(3)]
    for count in (1, 5, len(chosen)):
        for order in (chosen, *controls):
            assert int(first_of(order, count, sizes, unit).sum()) == count
    assert len({tuple(order[:5]) for order in controls}) == 3


@pytest.mark.parametrize("kind", [Kind.PLAIN, Kind.DENSE])
def test_a_curve_begins_with_the_whole_model_and_no_damage(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "steps", lambda _unit, _count: [40])
    model, held_out = model_of(kind), few(Split.HELD_OUT)
    order = random_order(layout(model), Unit.NEURONS, 0)
    curve = Meter(model, held_out, str(kind), 20).curve(order, Unit.NEURONS, "random 0")
    assert curve.sizes_P == (0, 40)
    assert np.array_equal(curve.sums_PD[0], loss_sums_D(model, held_out))
    for side in SIDES:
        hurt = damage(topic_losses(held_out, curve.sums_PD), side)
        assert (hurt.target_P[0], hurt.benign_P[0], hurt.worst_P[0]) == (0.0, 0.0, 0.0)
        assert hurt.benign_P[1] != 0.0
    assert (curve.share_P[0], curve.target_active_P[0]) == (0.0, 0.0)
    share = 40 * 3 * 128 / model.num_parameters()
    assert curve.share_P[1] == pytest.approx(share)
    if kind is Kind.DENSE:
        assert curve.benign_active_P[1] == pytest.approx(share)
    else:
        assert 0 < curve.benign_active_P[1] < 3 * share


def test_the_choice_refuses_held_out_text_and_the_measurement_any_other() -> None:
    model = model_of(Kind.DENSE)
    with pytest.raises(AssertionError, match="measurement alone"):
        orders(model, few(Split.HELD_OUT), [Unit.NEURONS])
    with pytest.raises(AssertionError, match="chose nothing"):
        Meter(model, few(Split.CHOOSE), "dense", 20)


def test_what_is_held_out_does_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def keep_order(_meter: Meter, order: Any, *_: Any) -> None:
        seen.append(order.tolist())

    monkeypatch.setattr(Meter, "curve", keep_order)
    model = model_of(Kind.DENSE)
    other = corpus(Split.HELD_OUT, tokenizer(), {**COUNTS, TARGET: 2})
    for held_out in (few(Split.HELD_OUT), other):
        study.curves_of(model, few(Split.CHOOSE), Meter(model, held_out, "dense", 20), 1)
    assert seen[:3] == seen[3:]


def test_the_texts_that_choose_have_no_held_out_syllable_and_no_word_of_a_held_out_request() -> None:
    choosing, held_out = (corpus(split, tokenizer()) for split in (Split.CHOOSE, Split.HELD_OUT))
    assert not set(choosing.texts) & set(held_out.texts)
    restricted = " ".join(choosing.texts[number] for number in choosing.members(TARGET))
    assert not any(syllable in restricted for syllable in LEXICONS[Split.HELD_OUT].syllables)
    assert not text.content_words(" ".join(choosing.texts)) & text.held_out_words()


def test_only_answers_count() -> None:
    texts = few(Split.HELD_OUT)
    for batch in texts.batches:
        for row, number in enumerate(batch.documents_B.tolist()):
            answer = tokenizer().decode(batch.ids_BT[row][batch.is_answer_BT[row]])
            assert texts.texts[number].endswith(answer.removesuffix("<|end|>"))
            assert len(answer) < len(texts.texts[number])
            assert batch.is_answer_BT[row].sum() == texts.answer_tokens_D[number]


@pytest.mark.parametrize("kind", [Kind.PLAIN, Kind.DENSE])
def test_costs_are_what_a_slight_weakening_costs(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = copy.deepcopy(model_of(kind)).double(), few(Split.CHOOSE)
    found: list[Tensor] = []

    def keep(weights_TE: Tensor, acts_TEN: Tensor, gradient_TH: Tensor, down: Tensor) -> Tensor:
        costs_TEN = costs(weights_TE, acts_TEN, gradient_TH, down)
        if down.data_ptr() == down_parameters(model)[2].data_ptr():
            found.append(costs_TEN.sum(0))
        return costs_TEN

    monkeypatch.setattr(choose, "costs", keep)
    of_experts, of_neurons = choose.attributions(model, texts)
    assert (of_neurons.sum(-1) >= of_experts * 0.999).all()
    costs_EN = torch.stack(found).sum(0)
    expert, neuron = (int(at) for at in np.unravel_index(int(costs_EN.abs().argmax()), costs_EN.shape))
    down = down_parameters(model)[2].data
    column = down[expert, :, neuron] if kind is Kind.PLAIN else down[:, neuron]
    share = 1e-3  # less drowns in the float32 of the router
    counted = np.isin(texts.topics, (TARGET, *BENIGN))
    whole = loss_sums_D(model, texts)[counted].sum()
    column.mul_(1 - share)
    weaker = loss_sums_D(model, texts)[counted].sum()
    assert (weaker - whole) / share == pytest.approx(float(costs_EN[expert, neuron]), rel=0.01)


def test_the_budget_is_used_up_between_two_points() -> None:
    benign_P = np.array([0.0, -0.01, 0.01, 0.03, 0.01])
    place, is_reached = place_at(benign_P, 0.02)
    assert place == pytest.approx(2.5)
    assert is_reached
    assert place_at(benign_P, 0.05) == (4.0, False)
    assert at_place([0, 1, 5, 7, 9], 2.5) == pytest.approx(6.0)


def test_an_interval_holds_the_value_and_documents_stay_in_their_topics() -> None:
    texts = corpus(Split.HELD_OUT, tokenizer(), dict.fromkeys(COUNTS, 20))
    times_RD = resampled(texts, 200)
    for topic in COUNTS:
        own = texts.members(topic)
        assert (times_RD[:, own].sum(1) == len(own)).all()
    random = np.random.default_rng(0)
    first_D = texts.answer_tokens_D * random.uniform(0.9, 1.1, len(texts.topics))
    factor_D = np.where(np.array(texts.topics) == TARGET, 1.5, 1.04) + random.uniform(-0.01, 0.01)
    zeros_P = np.zeros(2)
    curve = Curve(
        "m",
        20,
        "neurons",
        "activation",
        (0, 1),
        np.stack([first_D, factor_D * first_D]),
        *[zeros_P] * 3,
    )
    whole = np.ones((1, len(texts.topics)))
    exact = float(target_at(curve, texts, "held-out", 0.02, whole)[0])
    low, high = interval(target_at(curve, texts, "held-out", 0.02, times_RD))
    assert low < exact < high
    row = study.summary([curve], texts)[0]
    assert row["target"] == exact
    assert "over_dense" not in row


def test_the_separated_twin_is_trained_as_the_demo_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr(recipe, "NUM_DOCUMENTS", 48)
    plan = list(recipe.batches(tokenizer(), 20))
    assert len(plan) >= 2
    trained = []
    for train in (
        lambda model: twins.train(Kind.SEPARATED, model, plan),
        lambda model: recipe.train(model, plan, Console(quiet=True)),
    ):
        torch.manual_seed(3)
        model = build(Kind.SEPARATED, tokenizer())
        train(model)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_the_dense_twins_have_the_active_and_all_neurons_of_the_moe() -> None:
    moe, dense, wide = (layout(model_of(kind)) for kind in (Kind.PLAIN, Kind.DENSE, Kind.WIDE))
    assert dense.neurons == moe.top_k * moe.neurons
    assert wide.neurons == moe.experts * moe.neurons
    parameters = {
        kind: sum(p.numel() for name, p in model_of(kind).named_parameters() if "mlp" not in name)
        for kind in (Kind.PLAIN, Kind.DENSE, Kind.WIDE)
    }
    assert len(set(parameters.values())) == 1
