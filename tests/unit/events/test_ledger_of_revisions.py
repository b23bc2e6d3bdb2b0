"""The ledger while one revision follows another: steps that the earlier one decided still come."""

from __future__ import annotations

from dataclasses import replace

from guard.events.ledger import Ending, Ledger
from guard.events.message import Delta
from guard.events.rulebook import RuleBook
from guard.program.step_report import EventColumn, RequestColumn, StepReport
from tests.unit.events.reports import Row, everyone, report, rule

WATCH, STEER, STOP = rule("watch"), rule("steer", "mask"), rule("stop", "block")
OLD = RuleBook("rev-1", (WATCH, STEER, STOP), (1,), 1)
NEW = RuleBook("rev-2", (rule("stop", "block", policy="q"), WATCH), (), 0)


def of_new(*rows: Row) -> StepReport:
    made = replace(report(*rows, num_rules=2), revision="rev-2")
    return replace(made, requests_B=made.requests_B[:, : RequestColumn.NUM])


def deltas(ledger: Ledger) -> list[Delta]:
    found = []
    while (delta := ledger.take(idle=True)) is not None:
        found.append(delta)
    return found


def test_a_report_is_read_by_the_rules_of_its_own_revision() -> None:
    ledger = Ledger(0, OLD, clock=float, timer=float)
    ledger.follow(NEW)
    late = report(Row("a", block=(3, 2), events=[(2, 3, True)], selections=5))
    assert ledger.begin_step(late, everyone) == {"a": Ending("moe_guard:p/stop", 3)}
    ledger.end_step()
    assert ledger.begin_step(of_new(Row("b", block=(3, 0), events=[(0, 3, True)])), everyone) == {
        "b": Ending("moe_guard:q/stop", 3)
    }
    ledger.end_step()

    first, second = deltas(ledger)
    assert (first.revision, first.selections) == ("rev-1", [5])
    assert (second.revision, second.selections) == ("rev-2", [])
    decided = [(d.revision, d.policy, d.rule) for delta in (first, second) for d in delta.decisions]
    assert decided == [("rev-1", "p", "stop"), ("rev-2", "q", "stop")]
    assert [delta.decision_counts[0].rule for delta in (first, second)] == [2, 0]


def test_a_request_ends_with_the_most_that_happened_to_it_under_any_revision() -> None:
    ledger = Ledger(0, OLD, clock=float, timer=float)
    ledger.begin_step(report(Row("a", masks=[0])), everyone)
    ledger.end_step()
    ledger.follow(NEW)
    ledger.begin_step(of_new(Row("a")), everyone)
    ledger.finish("a")
    ledger.end_step()

    first, second = deltas(ledger)
    assert first.masked_requests == {"p": 1}
    assert (second.outcomes, second.masked_requests) == ({"masked": 1}, {"p": 0})


def test_what_could_not_be_sent_of_an_earlier_revision_goes_ahead_of_the_next() -> None:
    ledger = Ledger(0, OLD, clock=float, timer=float)
    ledger.begin_step(report(Row("a", events=[(0, 3, False)])), everyone)
    ledger.end_step()
    ledger.follow(NEW)
    ledger.begin_step(of_new(Row("a")), everyone)
    ledger.end_step()
    first = ledger.take(idle=True)
    assert first is not None
    ledger.put_back(first)

    again, second = deltas(ledger)
    assert (again.revision, again.decisions, len(again.decision_counts)) == ("rev-1", [], 1)
    assert (second.revision, second.dropped) == ("rev-2", {"deliver": 1})


def test_tokens_from_before_a_rule_make_a_request_unjudged_and_are_no_fault_to_block_for() -> None:
    closed = rule("stop", "block", policy="q", on_error="closed")
    ledger = Ledger(0, replace(NEW, rules=(closed, WATCH)), clock=float, timer=float)
    late = of_new(Row("a"))
    late.requests_B[:, RequestColumn.LATE] = 4
    assert ledger.begin_step(late, everyone) == {}
    ledger.finish("a")

    assert deltas(ledger)[0].outcomes == {"unjudged": 1}


def test_a_decision_says_what_its_own_rule_did_not_see() -> None:
    ledger = Ledger(0, OLD, clock=float, timer=float)
    made = report(Row("a", events=[(0, 3, False), (1, 3, False)]))
    made.events_V[1, EventColumn.UNSEEN] = 3
    ledger.begin_step(made, everyone)

    assert [decision.unseen_tokens for decision in deltas(ledger)[0].decisions] == [0, 3]


def test_the_same_bits_under_another_revision_are_other_masks() -> None:
    steer, turn = rule("steer", "mask", policy="p"), rule("turn", "mask", policy="q")
    ledger = Ledger(0, RuleBook("rev-1", (steer,), (0,), 1), clock=float, timer=float)
    ledger.follow(RuleBook("rev-2", (turn,), (0,), 1))
    masked = report(Row("a", masks=[0]), num_rules=1)
    for revision in ("rev-1", "rev-2"):  # a step of the old one was still under way
        ledger.begin_step(replace(masked, revision=revision), everyone)
        ledger.end_step()
    held = deltas(ledger)[-1].masked_requests
    assert {policy for policy, count in held.items() if count} == {"q"}
