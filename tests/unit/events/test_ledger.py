"""The ledger: which outcome a request ends with, which decisions become real, when they are sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest

from guard.events import tally as tally_module
from guard.events.ledger import Ending, Ledger
from guard.events.message import HOST_PARTS, Delta, RuleFacts
from guard.events.outcomes import OUTCOMES
from guard.events.rulebook import RuleBook
from guard.events.tally import FLUSH_SECONDS
from guard.failures import Stage
from guard.program.applicability import RulesFor
from guard.program.step_report import DraftReport, HostSeconds, Judged, StepReport
from tests.unit.events.reports import Row, everyone, failed, report, rule

RULES = (rule("watch"), rule("steer", "mask"), rule("stop", "block"))
OBSERVED, MASKED, BLOCKED = (0, 3, True), (1, 3, True), (2, 3, True)
STOPPED = "moe_guard:p/stop"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(
    rules: tuple[RuleFacts, ...] = RULES,
    *,
    redacted: bool = False,
    clock: Callable[[], float] | None = None,
    mask_rules: tuple[int, ...] = (1,),
    rules_of: Callable[[str], RulesFor] | None = None,
) -> Ledger:
    book = RuleBook("rev-1", rules, mask_rules, 1)
    clock = clock or Clock()
    return Ledger(0, book, redacted=redacted, rules_of=rules_of, clock=clock, timer=clock)


def nobody(_: Sequence[str]) -> dict[str, int]:
    return {}


def all_but(gone: str) -> Callable[[Sequence[str]], dict[str, int]]:
    return lambda req_ids: {r: row for r, row in everyone(req_ids).items() if r != gone}


def take(ledger: Ledger) -> Delta:
    delta = ledger.take(idle=True)
    assert delta is not None
    return delta


def ended(ledger: Ledger, *steps: StepReport) -> Delta:
    """The delta when request `a` ends with the last of the steps."""
    for number, step in enumerate(steps):
        ledger.begin_step(step, everyone)
        if number == len(steps) - 1:
            ledger.finish("a")
        ledger.end_step()
    return take(ledger)


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (Row("a"), "passed"),
        (Row("a", events=[OBSERVED]), "observed"),
        (Row("a", events=[(2, 3, False)]), "observed"),
        (Row("a", unseen=5), "unjudged"),
        (Row("a", unseen=5, events=[OBSERVED]), "unjudged"),
        (Row("a", judged=Judged.NO), "unjudged"),
        (Row("a", masks=[0]), "masked"),
        (Row("a", masks=[0], unseen=5), "masked"),
        (Row("a", events=[MASKED]), "masked"),
        (Row("a", block=(3, 2), events=[BLOCKED], masks=[0], unseen=5), "blocked"),
    ],
)
def test_a_requests_outcome_is_the_most_that_happened_to_it(row: Row, outcome: str) -> None:
    assert ended(make(), report(row)).outcomes == {outcome: 1}


@pytest.mark.parametrize("later", [Row("a"), Row("a", events=[OBSERVED])])
def test_what_happened_early_is_not_forgotten(later: Row) -> None:
    delta = ended(make(), report(Row("a", masks=[0])), report(later), report(later))

    assert delta.outcomes == {"masked": 1}


def test_a_request_that_ends_between_steps_keeps_its_unseen_prefix_in_mind() -> None:
    ledger = make()
    ledger.begin_step(report(Row("a", unseen=5)), everyone)
    ledger.end_step()
    ledger.finish("a")

    assert take(ledger).outcomes == {"unjudged": 1}


def test_a_request_on_which_ranks_differ_is_unjudged_follows_the_fail_mode_and_is_counted() -> None:
    ledger = make((rule("stop", "block", on_error="closed"),), mask_rules=())
    differing = report(Row("a", judged=Judged.RANKS_DIFFER), Row("b"), num_rules=1)

    assert ledger.begin_step(differing, everyone) == {"a": Ending("moe_guard:p/stop")}
    ledger.end_step()
    for req_id in ("a", "b"):
        ledger.finish(req_id)

    delta = take(ledger)
    assert delta.failures == {Stage.RANKS: 1}
    assert delta.outcomes == {"blocked": 1, "passed": 1}


def test_a_request_that_never_ran_passed() -> None:
    ledger = make()
    ledger.finish("a")

    assert take(ledger).outcomes == {"passed": 1}


def test_a_request_id_that_is_used_again_starts_afresh() -> None:
    ledger = make()
    ended(ledger, report(Row("a", masks=[0])))

    assert ended(ledger, report(Row("a"))).outcomes == {"passed": 1}


def test_a_step_that_does_not_count_leaves_nothing_behind() -> None:
    ledger = make()
    row = Row("a", 4, 2, block=(3, 2), masks=[0], unseen=3, selections=9, events=[BLOCKED])

    assert ledger.begin_step(report(row), nobody) == {}
    assert ledger.mask_starts() == {}
    ledger.end_step()
    ledger.finish("b")

    delta = take(ledger)
    assert delta.outcomes == {"passed": 1}
    assert (delta.decisions, delta.decision_counts, delta.tokens) == ([], [], {})
    assert (delta.selections, delta.masked_requests) == ([0], {"p": 0})


def test_tokens_and_selections_are_summed_over_the_requests_that_count() -> None:
    ledger = make()
    step = report(Row("a", 4, 1, selections=2), Row("gone", 8, 8, selections=8), Row("b", 1, 0))
    ledger.begin_step(step, all_but("gone"))

    delta = take(ledger)
    assert delta.tokens == {"prompt": 5, "output": 1}
    assert delta.selections == [2]


def test_decisions_behind_a_block_are_dropped_and_those_at_it_are_kept() -> None:
    ledger = make()
    events = [(0, 3, True), (2, 4, True), (0, 4, True), (0, 5, True)]

    blocked = ledger.begin_step(report(Row("a", block=(4, 2), events=events)), everyone)

    delta = take(ledger)
    assert blocked == {"a": Ending(STOPPED, 4)}
    assert [(d.rule, d.position) for d in delta.decisions] == [
        ("watch", 3),
        ("stop", 4),
        ("watch", 4),
    ]
    assert {(c.rule, c.mode, c.phase): c.count for c in delta.decision_counts} == {
        (0, "enforce", "output"): 2,
        (2, "enforce", "output"): 1,
    }


def test_a_decision_says_what_was_done_and_in_which_phase() -> None:
    ledger = make()
    step = report(Row("1_x-0123abcd", events=[(1, 1, True), (2, 2, False)], unseen=6))
    ledger.begin_step(step, everyone)

    first, second = take(ledger).decisions
    assert (first.phase, first.mode, first.action, first.outcome) == (
        "prompt", "enforce", "mask", "masked"
    )  # fmt: skip
    assert (second.phase, second.mode, second.action, second.outcome) == (
        "output", "audit", "block", "observed"
    )  # fmt: skip
    assert first.decision_id != second.decision_id
    assert (first.revision, first.unseen_tokens, first.time) == (
        "rev-1", 6, "1970-01-01T00:16:40.000+00:00"
    )  # fmt: skip
    assert [(e.condition, e.value, e.threshold) for e in first.evidence] == [("rate", 0.5, 0.25)]


def test_evidence_that_was_unknown_is_none() -> None:
    step = report(Row("a", events=[OBSERVED]))
    step.values_V[:] = math.nan
    ledger = make()
    ledger.begin_step(step, everyone)

    assert take(ledger).decisions[0].evidence[0].value is None


def test_redaction_hides_names_from_clients_and_not_from_the_log() -> None:
    ledger = make(redacted=True)

    assert ledger.begin_step(report(Row("a", block=(3, 2), events=[BLOCKED])), everyone) == {
        "a": Ending("moe_guard", 3)
    }
    assert take(ledger).decisions[0].policy == "p"


def test_an_exempt_firing_is_logged_as_such_and_counts_as_one_in_audit() -> None:
    held_back = (2, 3, False)
    delta = ended(make(), report(Row("a", events=[OBSERVED, held_back], exempt=[held_back])))

    assert [(d.rule, d.exempt, d.mode, d.action, d.outcome) for d in delta.decisions] == [
        ("watch", False, "enforce", "observe", "observed"),
        ("stop", True, "audit", "block", "observed"),
    ]
    assert delta.outcomes == {"observed": 1}
    assert [(c.rule, c.mode) for c in delta.decision_counts] == [(0, "enforce"), (2, "audit")]


def closed(mode: str = "enforce", action: str = "block") -> tuple[RuleFacts, ...]:
    return (
        rule("watch"),
        rule("steer", "mask"),
        rule("shut", action, mode=mode, on_error="closed"),
    )


def test_an_unjudged_request_passes_where_faults_are_open() -> None:
    ledger = make()

    assert ledger.begin_step(report(Row("a", judged=Judged.NO)), everyone) == {}
    assert ledger.begin_step(failed("a"), everyone) == {}


@pytest.mark.parametrize("step", [report(Row("a", judged=Judged.NO)), failed("a")])
def test_an_unjudged_request_is_blocked_where_an_enforced_rule_is_closed(step: StepReport) -> None:
    ledger = make(closed())

    assert ledger.begin_step(step, everyone) == {"a": Ending("moe_guard:p/shut")}
    ledger.finish("a")
    assert take(ledger).outcomes == {"blocked": 1}


def test_a_closed_rule_blocks_only_requests_on_which_it_acts() -> None:
    def rules_of(req_id: str) -> RulesFor:
        flags_R = np.array([req_id == "a"] * len(closed()), dtype=np.bool_)
        return RulesFor(flags_R, flags_R, ~flags_R)

    ledger = make(closed("audit"), rules_of=rules_of)
    assert ledger.begin_step(failed("a", "b"), everyone) == {"a": Ending("moe_guard:p/shut")}


def test_a_closed_rule_in_audit_withholds_its_block() -> None:
    assert make(closed("audit")).begin_step(failed("a"), everyone) == {}


def test_a_block_for_a_fault_in_the_middle_of_a_prompt_waits_for_the_first_token() -> None:
    ledger = make(closed())
    ledger.begin_step(failed("a"), everyone)  # a chunk of a prompt: the engine has no token to drop
    ledger.end_step()

    assert ledger.begin_step(report(Row("a"), Row("b")), everyone) == {"a": Ending("moe_guard:p/shut")}
    ledger.finish("a")
    ledger.end_step()
    assert ledger.begin_step(report(Row("a")), everyone) == {}, "that is another request"


def test_a_failed_step_counts_its_failures_and_no_tokens() -> None:
    ledger = make()
    ledger.begin_step(failed("a", "b"), everyone)
    ledger.finish("a")
    ledger.end_step()

    delta = take(ledger)
    assert (delta.failures, delta.tokens, delta.outcomes) == ({"evaluate": 1}, {}, {"unjudged": 1})


def test_the_gauge_of_masked_requests_falls_on_release_and_at_the_end() -> None:
    two = (*RULES, rule("more", "mask", policy="q"))
    ledger = make(two, mask_rules=(1, 3))

    def gauge(*rows: Row) -> dict[str, int]:
        ledger.begin_step(report(*rows, num_rules=4), everyone)
        ledger.end_step()
        return take(ledger).masked_requests

    assert gauge(Row("a", masks=[0]), Row("b", masks=[0, 1])) == {"p": 2, "q": 1}
    assert gauge(Row("a")) == {"p": 1, "q": 1}
    ledger.finish("b")
    assert take(ledger).masked_requests == {"p": 0, "q": 0}


def test_mask_actions_beyond_the_first_word_belong_to_their_rules() -> None:
    rules = tuple(rule("r", "mask", policy=f"p-{n}") for n in range(65))
    ledger = make(rules, mask_rules=tuple(range(65)))
    ledger.begin_step(report(Row("a", masks=[63, 64]), num_rules=65), everyone)

    masked = take(ledger).masked_requests
    assert {policy for policy, count in masked.items() if count} == {"p-63", "p-64"}


def test_a_step_that_could_not_be_entered_has_not_seen_all() -> None:
    """Else blocks that a mask may have reached would be shared."""

    def broken(_: Sequence[str]) -> dict[str, int]:
        raise RuntimeError

    ledger = make()
    seen = []
    for enter in (everyone, broken, everyone):
        with suppress(RuntimeError):
            ledger.begin_step(report(Row("a")), enter)
        seen.append(ledger.has_seen_all)
    ledger.give_up(["a"])
    assert [*seen, ledger.has_seen_all] == [True, False, True, False]


def test_a_request_that_takes_the_id_of_one_that_ended_is_masked_as_well() -> None:
    ledger = make()
    for _ in range(2):
        for _ in range(3):
            ledger.begin_step(report(Row("a", masks=[0])), everyone)
            ledger.end_step()
        ledger.finish("a")
    assert take(ledger).outcomes == {"masked": 2}


def test_the_start_of_a_mask_is_known_during_its_step_alone() -> None:
    ledger = make()
    ledger.begin_step(report(Row("a", masked_from=7), Row("b")), everyone)

    assert ledger.mask_starts() == {"a": 7}
    ledger.end_step()
    assert ledger.mask_starts() == {}


def test_decisions_beyond_the_buffer_are_dropped_and_counted_in_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tally_module, "MAX_PENDING_DECISIONS", 2)
    ledger = make()
    ledger.begin_step(report(Row("a", events=[OBSERVED] * 9), kept_events=5), everyone)

    delta = take(ledger)
    assert len(delta.decisions) == 2
    assert [count.count for count in delta.decision_counts] == [9]
    assert delta.dropped == {"event_buffer": 3, "evaluate": 4}


def test_firings_without_evidence_count_where_their_request_and_position_do() -> None:
    """As those do that have it: not of a request that is over, not behind a block."""
    rows = (
        Row("over", events=[OBSERVED]),
        Row("a", events=[OBSERVED, MASKED, (0, 1, False)]),
        Row("b", block=(7, 2), events=[(0, 6, False), (2, 7, True), (0, 8, False)]),
    )
    counted, told = [], []
    for kept_events in (512, 0):
        ledger = make()
        endings = ledger.begin_step(report(*rows, kept_events=kept_events), all_but("over"))
        for req_id in ("a", "b"):
            ledger.finish(req_id)
        ledger.end_step()
        delta = take(ledger)
        counted.append(sorted(delta.decision_counts, key=str))
        told.append((endings, delta.outcomes))

    assert counted[0] == counted[1]
    assert (
        told[0]
        == told[1]
        == (
            {"b": Ending("moe_guard:p/stop", 7)},
            {"masked": 1, "blocked": 1},
        )
    )
    assert sum(count.count for count in counted[1]) == 5
    assert delta.dropped == {"evaluate": 5}


@pytest.mark.parametrize("kept_events", [512, 0])
def test_firings_at_drafts_that_the_engine_takes_back_do_not_count(kept_events: int) -> None:
    ledger = make()
    rows = Row("a", output=3, events=[(0, 6, False), (0, 7, False), (0, 8, False)])
    drafted = DraftReport(
        next_B=np.array([9]),
        num_rows_B=np.array([2]),
        sets_BKN=np.zeros((1, 2, 1), dtype=np.int64),
        extremes_BKC=np.full((1, 2, 3), np.nan, dtype=np.float32),
    )
    step = dataclasses.replace(report(rows, kept_events=kept_events), drafts=drafted)
    ledger.begin_step(step, everyone)
    ledger.accept("a", 7)
    ledger.end_step()

    delta = take(ledger)
    assert [count.count for count in delta.decision_counts] == [2]
    assert len(delta.decisions) + delta.dropped.get("evaluate", 0) == 2


def test_values_are_given_once_for_each_request_that_ends_and_only_where_known() -> None:
    ledger = make()
    ledger.begin_step(report(Row("a", extreme=0.5), Row("b", extreme=0.75), Row("c")), everyone)
    ledger.finish("a")
    ledger.finish("c")

    assert take(ledger).values == [(n, 0, [0.5]) for n in range(3)]


def test_counters_wait_for_the_flush_and_decisions_do_not() -> None:
    clock = Clock()
    ledger = make(clock=clock)

    def due(*rows: Row, idle: bool = False) -> bool:
        ledger.begin_step(report(*rows), everyone)
        ledger.end_step()
        return ledger.take(idle=idle) is not None

    assert due(Row("a"))
    assert not due(Row("a"))
    clock.now += FLUSH_SECONDS / 2
    assert not due(Row("a"))
    assert due(Row("a", events=[OBSERVED]))
    assert not due(Row("a"))
    clock.now += FLUSH_SECONDS
    assert due(Row("a"))
    assert due(Row("a"), idle=True)
    clock.now += FLUSH_SECONDS
    assert ledger.take(idle=True) is None, "nothing moved"


def test_a_delta_starts_from_zero() -> None:
    ledger = make()
    ended(ledger, report(Row("a", 3, 1, selections=2, extreme=0.5, events=[OBSERVED])))

    delta = ended(ledger, report(Row("a", 1, 0)))

    assert (delta.decisions, delta.decision_counts, delta.values) == ([], [], [])
    assert (delta.tokens, delta.selections) == ({"prompt": 1, "output": 0}, [0])


def test_outcomes_are_ranked_as_the_contract_ranks_them() -> None:
    assert OUTCOMES == ("passed", "observed", "unjudged", "masked", "blocked")


def test_steps_and_the_hosts_time_are_counted_once_and_ask_for_no_delta_of_their_own() -> None:
    ledger = make()
    for step in (report(Row("a")), failed("a")):
        timed = dataclasses.replace(step, host=HostSeconds(1.0, 2.0, 0.5))
        ledger.note_step(timed)
        ledger.begin_step(timed, everyone)
        ledger.end_step()
        ledger.note_own_time(0.25)

    delta = take(ledger)
    assert delta.steps == 2
    assert delta.host_seconds == {"begin": 2.0, "end": 4.0, "report": 1.0, "ledger": 0.5}
    assert set(delta.host_seconds) == set(HOST_PARTS)
    ledger.note_own_time(0.125)
    assert ledger.take(idle=True) is None

    ledger.put_back(delta)
    again = take(ledger)
    assert again.steps == 2
    assert again.host_seconds == delta.host_seconds | {"ledger": 0.625}


def test_time_that_nobody_was_told_of_goes_over_to_the_next_revision() -> None:
    ledger = make()
    ledger.note_own_time(0.25)
    ledger.follow(RuleBook("rev-2", (), (), 0))
    assert ledger.take(idle=True) is None
    ledger.note_step(report(Row("a")))
    delta = take(ledger)
    assert (delta.revision, delta.steps, delta.host_seconds) == ("rev-2", 1, {"ledger": 0.25})
