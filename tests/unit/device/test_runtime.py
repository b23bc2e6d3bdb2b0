"""What a guard does from step to step that a single request, evaluated to its end, never meets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard.device.actions import StepActions
from guard.device.layout import MAX_EVENTS_PER_STEP
from guard.failures import Stage
from guard.program.applicability import RequestFacts
from guard.program.step_report import NEVER, EventColumn, RequestColumn, StepReport
from tests.unit.device.driving import (
    BLOCK,
    COUNT,
    FLAGGED,
    MASK,
    OTHER,
    Engine,
    block_position,
    fired,
    policy_text,
    rule_text,
    tokens,
)

COUNTS = policy_text(rule_text(COUNT))
MASKS = policy_text(rule_text(COUNT, MASK))
RATE = policy_text(rule_text("{rate: {experts: f, over: 4, minTokens: 1, above: 0.26}}"))


def test_slots_that_change_hands_ten_times_keep_nothing_of_the_request_before() -> None:
    engine = Engine(
        policy_text(
            rule_text(COUNT, MASK)
            + rule_text("{count: {experts: f, over: request, atLeast: 2}}", BLOCK, name="b")
            + rule_text(COUNT, name="c", rest=", persist: {hits: 2, of: 3}")
        )
    )
    for turn in range(10):
        names = [f"{turn}-{slot}" for slot in range(4)]
        for name in names:
            engine.guard.add_request(name, 2)
        first = engine.step({name: (0, [FLAGGED, OTHER]) for name in names})
        assert fired(first) == [(name, 0) for name in names]
        assert (first.requests_B[:, RequestColumn.BLOCK_KEY] == NEVER).all()
        assert engine.masked_rows(8) == [False] * 8
        second = engine.step({name: (2, [FLAGGED]) for name in names})
        assert [block_position(second, 3, row) for row in range(4)] == [2] * 4
        assert engine.masked_rows(4) == [True] * 4
        assert {tokens(second, row) for row in range(4)} == {(0, 1)}
        engine.guard.finish_requests(names)
    assert engine.guard.num_requests == 0


def test_a_slot_that_changes_hands_before_any_step_belongs_to_the_last_request() -> None:
    engine = Engine(COUNTS, max_slots=1)
    engine.guard.add_request("gone", 100)
    engine.guard.finish_requests(["gone"])
    engine.guard.add_request("a", 1)

    assert tokens(engine.step({"a": (0, [OTHER, OTHER])})) == (1, 1)


def test_a_preempted_request_counts_once_and_is_masked_at_the_same_positions_again() -> None:
    engine = Engine(MASKS)
    engine.guard.add_request("a", 2)
    engine.step({"a": (0, [OTHER, OTHER])})
    engine.step({"a": (2, [FLAGGED])})
    engine.step({"a": (3, [OTHER])})
    assert engine.masked_rows(1) == [True]
    engine.guard.add_request("other", 1)
    for position in range(3):
        engine.step({"other": (position, [OTHER])})

    engine.guard.add_request("a", 2)  # a runner may announce it again
    again = engine.step({"a": (0, [OTHER, OTHER, FLAGGED, OTHER, OTHER])})

    assert engine.masked_rows(5) == [False, False, False, True, True]
    assert tokens(again) == (0, 1)
    assert fired(again) == []
    assert again.requests_B[0, RequestColumn.UNSEEN] == 0


def test_recomputation_in_chunks_counts_nothing_until_it_reaches_what_is_new() -> None:
    engine = Engine(COUNTS)
    engine.guard.add_request("a", 4)
    engine.step({"a": (0, [FLAGGED] * 4)})

    assert tokens(engine.step({"a": (0, [FLAGGED] * 3)})) == (0, 0)
    assert tokens(engine.step({"a": (3, [FLAGGED, OTHER])})) == (0, 1)


def test_more_requests_than_slots_make_room_and_keep_what_is_known_of_the_earlier_ones() -> None:
    rule = rule_text("{count: {experts: f, over: request, atLeast: 3}}", MASK)
    engine = Engine(policy_text(rule), max_slots=1)
    engine.guard.add_request("first", 1)
    engine.step({"first": (0, [FLAGGED, FLAGGED])})
    others = [f"other-{i}" for i in range(9)]
    for req_id in others:
        engine.guard.add_request(req_id, 1)
        engine.step({req_id: (0, [FLAGGED, FLAGGED])})

    report = engine.step({"first": (2, [FLAGGED]), others[0]: (2, [OTHER]), others[8]: (2, [FLAGGED])})

    assert report.failures == {}
    assert report.requests_B[:, RequestColumn.JUDGED].tolist() == [1, 1, 1]
    assert fired(report) == [("first", 2), (others[8], 2)]
    engine.guard.begin_step(["first", others[0], others[8]], torch.arange(4), torch.tensor([3, 3, 3]))
    assert engine.masked_rows(3) == [True, False, True]


def test_an_unjudged_request_counts_no_tokens_and_no_selections() -> None:
    engine = Engine(COUNTS, max_slots=1)
    engine.guard.add_request("a", 1)  # and "b" was never admitted

    for position in (0, 5):
        report = engine.step({"a": (position, [OTHER]), "b": (position, [FLAGGED] * 3)})
        assert tokens(report, 1) == (0, 0)
        assert report.requests_B[1, RequestColumn.UNSEEN] == 0
        assert report.requests_B[1, RequestColumn.NUM :].tolist() == [0]


def test_a_freed_slot_serves_the_next_request() -> None:
    engine = Engine(COUNTS, max_slots=1)
    engine.guard.add_request("a", 1)
    engine.guard.finish_requests(["a", "never heard of"])
    engine.guard.add_request("b", 1)

    assert fired(engine.step({"b": (0, [FLAGGED])})) == [("b", 0)]


def test_a_fault_in_admission_takes_no_slot() -> None:
    engine = Engine(COUNTS, max_slots=1)
    engine.guard.add_request("a", 1, facts=7)  # type: ignore[arg-type]
    engine.guard.add_request("b", 1)

    report = engine.step({"a": (0, [FLAGGED]), "b": (0, [FLAGGED])})

    assert report.requests_B[:, RequestColumn.JUDGED].tolist() == [0, 1]
    assert report.failures == {Stage.ADMIT: 1}


def fail(*_: object) -> None:
    raise RuntimeError("injected")


def test_a_request_whose_slot_could_not_be_written_is_not_judged_by_what_another_left_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(COUNTS, max_slots=1)
    engine.guard.add_request("before", 1)
    engine.step({"before": (0, [FLAGGED])})
    engine.guard.finish_requests(["before"])
    with monkeypatch.context() as patch:
        patch.setattr(engine.guard._state, "add_request", fail)
        engine.guard.add_request("a", 1)
    engine.guard.add_request("b", 1)  # the slot is free again

    report = engine.step({"a": (0, [OTHER]), "b": (0, [FLAGGED])})

    assert report.requests_B[:, RequestColumn.JUDGED].tolist() == [0, 1]
    assert report.failures == {Stage.ADMIT: 1}
    assert fired(report) == [("b", 0)]


def test_a_fault_in_the_evaluation_fails_that_step_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(COUNTS)
    engine.guard.add_request("a", 1)
    with monkeypatch.context() as broken:
        broken.setattr(engine.guard._evaluator, "evaluate", fail)
        failed = engine.step({"a": (0, [FLAGGED])})
    good = engine.step({"a": (1, [FLAGGED])})

    assert failed.failed
    assert (failed.req_ids, failed.failures) == (("a",), {Stage.EVALUATE: 1})
    assert not good.failed
    assert fired(good) == [("a", 1)]
    assert good.requests_B[0, RequestColumn.UNSEEN] == 1
    assert tokens(good) == (0, 1)


def test_a_fault_before_the_forward_masks_nobody_and_loses_no_admission(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(policy_text(rule_text("{always: {}}", MASK)))
    engine.guard.add_request("a", 1)
    with monkeypatch.context() as broken:
        broken.setattr(engine.guard._state, "_static_masks", fail)
        failed = engine.step({"a": (0, [OTHER])})
        assert engine.masked_rows(1) == [False]
    engine.step({"a": (1, [OTHER])})

    assert failed.failed
    assert failed.failures == {Stage.BEGIN_STEP: 1}
    assert engine.masked_rows(1) == [True]


def test_a_step_that_could_not_be_begun_is_not_under_the_masks_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(policy_text(rule_text("{always: {}}", MASK)))
    engine.guard.add_request("a", 1)
    for position in range(2):
        engine.step({"a": (position, [OTHER])})
        assert engine.masked_rows(1) == [True]
    monkeypatch.setattr(engine.guard, "begin_step_uncaught", fail)
    engine.guard.begin_step(["b"], torch.tensor([0, 1]), torch.tensor([0]))
    assert engine.masked_rows(1) == [False]


def test_a_window_that_reaches_over_a_failed_step_sees_only_its_own_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(RATE)
    engine.guard.add_request("a", 1)
    rates = {}
    for position in range(16):
        expert = FLAGGED if position in (5, 6, 7) else OTHER
        with monkeypatch.context() as broken:
            if position in (8, 9):
                broken.setattr(engine.guard, "_whole", None)  # in parts
                broken.setattr(engine.guard._evaluator, "evaluate", fail)
            report = engine.step({"a": (position, [expert])})
        if not report.failed:
            rates[position] = bool(engine.guard._state.active_SR[1, 0])

    # Positions 8 and 9 are unseen: at 10, flagged 7 of the seen 7 and 10; at 11, none of 10 and 11.
    assert {p: active for p, active in rates.items() if p >= 5} == {
        5: False, 6: True, 7: True, 10: True, 11: False, 12: False, 13: False, 14: False, 15: False
    }  # fmt: skip


def test_an_idle_forward_is_masked_nowhere_and_reports_nothing() -> None:
    engine = Engine(policy_text(rule_text("{always: {}}", MASK)))
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [OTHER] * 3)})
    assert engine.masked_rows(3) == [True] * 3

    engine.guard.idle()

    assert engine.masked_rows(3) == [False] * 3
    assert engine.guard.end_step() is None


def test_a_step_left_unfinished_does_not_leak_into_the_next() -> None:
    engine = Engine(COUNTS)
    engine.guard.add_request("a", 1)
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([0]))

    assert tokens(engine.step({"a": (0, [OTHER])})) == (1, 0)


def test_of_more_firings_than_a_step_reports_with_evidence_none_is_lost() -> None:
    """As many as there can be: at every second row of each request, the first one included."""
    engine = Engine(COUNTS)
    for req_id in ("a", "b"):
        engine.guard.add_request(req_id, 2000)

    alone = engine.step({"a": (0, [FLAGGED, OTHER] * 600 + [FLAGGED])})
    report = engine.step({"a": (1201, [OTHER, FLAGGED] * 500), "b": (0, [FLAGGED, OTHER, FLAGGED])})

    assert (alone.num_events, report.num_events) == (601, 502)
    assert _told(alone) == [[0, 2 * n] for n in range(601)]
    assert len(alone.events_V) == len(alone.values_V) == MAX_EVENTS_PER_STEP
    assert _told(report) == [*([0, 1202 + 2 * n] for n in range(500)), [1, 0], [1, 2]]


def _told(report: StepReport) -> list[list[int]]:
    """[request, position] of each firing, with evidence and without."""
    events = np.concatenate([report.events_V, report.more_events_V])
    told: list[list[int]] = sorted(events[:, [EventColumn.REQUEST, EventColumn.POSITION]].tolist())
    return told


def test_a_block_is_never_lost_behind_more_firings_than_a_step_reports() -> None:
    noisy = policy_text(rule_text(COUNT), name="noisy", mode="audit")
    block = "{count: {experts: f, over: request, atLeast: 600}}"
    engine = Engine(f"{noisy}---\n{policy_text(rule_text(block, BLOCK), name='strict')}")
    engine.guard.add_request("a", 1)

    report = engine.step({"a": (0, [FLAGGED, OTHER] * 650)})

    assert report.num_events == 651
    assert block_position(report, len(engine.program.rules)) == 2 * 599


def test_firings_that_act_are_not_crowded_out_by_another_requests_that_do_not() -> None:
    noisy = policy_text(rule_text(COUNT), name="noisy", mode="audit")
    engine = Engine(f"{noisy}---\n{policy_text(rule_text(COUNT, BLOCK), name='strict')}")
    engine.guard.add_request("noise", 2000)
    engine.guard.add_request("b", 1)

    report = engine.step({"noise": (0, [FLAGGED, OTHER] * 600), "b": (0, [FLAGGED])})

    rules = [(event[EventColumn.REQUEST], event[EventColumn.RULE]) for event in report.events_V]
    strict = next(n for n, rule in enumerate(engine.program.rules) if rule.policy == "strict")
    assert (1, strict) in rules
    assert fired(report) == sorted(fired(report), key=lambda f: (f[0] == "b", f[1]))


@pytest.mark.parametrize("until", ["2", "clear"])
def test_a_recompute_repeats_every_stretch_of_a_mask_that_came_and_went(until: str) -> None:
    engine = Engine(policy_text(rule_text(COUNT, f"{{mask: {{experts: f, until: {until}}}}}")))
    engine.guard.add_request("a", 1)
    experts = [OTHER, FLAGGED, OTHER, OTHER, OTHER, FLAGGED, OTHER, OTHER, OTHER, OTHER]
    first = []
    for position, expert in enumerate(experts):
        engine.step({"a": (position, [expert])})
        first += engine.masked_rows(1)
    assert first.count(True) >= 2

    engine.step({"a": (0, [*experts, OTHER])})

    assert engine.masked_rows(len(experts)) == first


def test_a_blind_guard_judges_nothing_and_says_so() -> None:
    engine = Engine(policy_text(rule_text("{count: {experts: f, atMost: 0}}", BLOCK)))
    engine.guard.add_request("a", 1)
    engine.guard.blind = True

    assert engine.step({"a": (0, [OTHER])}).failed


def test_a_rule_that_fired_in_a_broken_off_evaluation_fires_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(policy_text(rule_text(COUNT, BLOCK)))
    engine.guard.add_request("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(StepActions, "apply", fail)
        assert engine.step({"a": (0, [FLAGGED])}).failed

    assert fired(engine.step({"a": (1, [FLAGGED])})) == [("a", 1)]


def test_exactly_as_many_firings_as_fit_are_all_reported() -> None:
    engine = Engine(COUNTS)
    engine.guard.add_request("a", 1000)

    report = engine.step({"a": (0, [FLAGGED, OTHER] * MAX_EVENTS_PER_STEP)})

    assert report.num_events == len(report.events_V) == MAX_EVENTS_PER_STEP
    assert fired(report)[-1] == ("a", 2 * MAX_EVENTS_PER_STEP - 2)


def test_rejected_draft_rows_count_nowhere_and_are_judged_when_they_come_again() -> None:
    engine = Engine(COUNTS)
    engine.guard.add_request("a", 1)
    engine.guard.add_request("b", 1)
    engine.step({"a": (0, [OTHER]), "b": (0, [OTHER])})

    report = engine.step(
        {"a": (1, [OTHER, OTHER, FLAGGED]), "b": (1, [OTHER, FLAGGED])}, rejected=[1, 0]
    )
    again = engine.step({"a": (3, [FLAGGED]), "b": (3, [OTHER])}, rejected=[0, 0])

    assert fired(report) == [("b", 2)]
    assert [tokens(report, row) for row in range(2)] == [(0, 2), (0, 2)]
    assert fired(again) == [("a", 3)]
    assert again.requests_B[0, RequestColumn.UNSEEN] == 0


def test_after_a_partial_acceptance_masks_begin_at_the_first_position_not_accepted() -> None:
    engine = Engine(MASKS)
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [OTHER])})

    report = engine.step({"a": (1, [FLAGGED, OTHER, FLAGGED, FLAGGED])}, rejected=[2])
    assert report.requests_B[0, RequestColumn.MASK_FROM] == 3
    engine.step({"a": (3, [OTHER, OTHER])}, rejected=[0])

    assert engine.masked_rows(2) == [True, True]


def test_after_a_partial_acceptance_a_block_counts_accepted_rows_only() -> None:
    engine = Engine(policy_text(rule_text(COUNT, BLOCK)))
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [OTHER])})

    unblocked = engine.step({"a": (1, [OTHER, FLAGGED])}, rejected=[1])
    blocked = engine.step({"a": (2, [OTHER, FLAGGED, FLAGGED])}, rejected=[1])

    assert block_position(unblocked, 1) is None
    assert block_position(blocked, 1) == 3


def test_a_mask_that_was_released_is_not_reported_in_force() -> None:
    engine = Engine(policy_text(rule_text(COUNT, "{mask: {experts: f, until: clear}}")))
    engine.guard.add_request("a", 1)

    assert engine.step({"a": (0, [FLAGGED])}).masked_BW[0].tolist() == [1]
    assert engine.step({"a": (1, [OTHER])}).masked_BW[0].tolist() == [0]


def test_observing_only_audits_every_mask_and_still_blocks() -> None:
    text = policy_text(rule_text(COUNT, MASK) + rule_text(COUNT, BLOCK, name="b"))
    engine = Engine(text, masking=False)
    engine.guard.add_request("a", 1, RequestFacts(enforced=frozenset({"p"})))

    report = engine.step({"a": (0, [FLAGGED])})

    assert report.masked_BW[0].tolist() == [0]
    assert [int(event[EventColumn.ENFORCED]) for event in report.events_V] == [0, 1]
    assert block_position(report, 2) == 0


def test_without_rules_requests_are_remembered_and_nothing_is_reported() -> None:
    engine = Engine(COUNTS.replace("mode: enforce", "mode: off"))
    engine.guard.add_request("a", 1)
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([0]))

    assert engine.guard.end_step() is None
    assert engine.guard.num_requests == 1
    engine.guard.finish_requests(["a"])
    assert engine.guard.num_requests == 0


def test_a_rule_is_evaluated_only_for_requests_that_it_matches() -> None:
    match = ", match: {labels: {tenant: red}}"
    text = policy_text(
        rule_text("{always: {}}", MASK, name="s", rest=match) + rule_text(COUNT, BLOCK, rest=match),
        extra="  exceptions: [{name: e, match: {labels: {team: x}}}]\n",
    )
    engine = Engine(text)
    engine.guard.add_request("matched", 1, RequestFacts("matched", {"tenant": "red"}))
    engine.guard.add_request("exempt", 1, RequestFacts("exempt", {"tenant": "red", "team": "x"}))
    engine.guard.add_request("other", 1, RequestFacts("other", {"team": "x"}))

    report = engine.step({name: (0, [FLAGGED]) for name in ("matched", "exempt", "other")})

    columns = [EventColumn.REQUEST, EventColumn.RULE, EventColumn.ENFORCED, EventColumn.EXEMPT]
    assert report.events_V[:, columns].tolist() == [
        [0, 0, 1, 0],
        [0, 1, 1, 0],
        [1, 0, 0, 1],
        [1, 1, 0, 1],
    ]
    assert [block_position(report, 2, row) for row in range(3)] == [0, None, None]
    assert report.masked_BW[:, 0].tolist() == [1, 0, 0]
    known_BC = ~np.isnan(report.extremes_BC)
    assert known_BC.any(axis=1).tolist() == [True, True, False], "it has no signal values either"


def test_a_request_may_tighten_an_audit_policy_for_itself_alone() -> None:
    engine = Engine(policy_text(rule_text(COUNT, BLOCK), mode="audit"))
    engine.guard.add_request("a", 1, RequestFacts(enforced=frozenset({"p"})))
    engine.guard.add_request("b", 1)

    report = engine.step({"a": (0, [FLAGGED]), "b": (0, [FLAGGED])})

    assert [block_position(report, 1, row) for row in range(2)] == [0, None]
