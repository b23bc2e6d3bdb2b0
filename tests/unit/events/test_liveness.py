"""When the guard is up, and what requests go through while it is not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from guard.events.ledger import Ledger
from guard.events.liveness import Liveness
from guard.events.message import Delta, Health, RuleFacts
from guard.events.rulebook import RuleBook
from guard.failures import Stage
from guard.program.step_report import Finding, Judged, RoutingCheck, StepReport
from tests.unit.events.reports import Row, check, everyone, failed, report, rule

UP, DOWN = Health(0, True, 0), Health(0, False, 0)


def checked(found: RoutingCheck, *rows: Row) -> StepReport:
    return replace(report(*(rows or [Row("a")])), check=found)


MASKS = (rule("steer", "mask"), rule("steer", "mask", policy="q"))


def liveness(**settings: bool | int) -> Liveness:
    return Liveness(**settings)  # type: ignore[arg-type]


def test_nothing_is_told_while_nothing_changes() -> None:
    live = liveness()
    for _ in range(3):
        assert live.note(checked(check(num_actions=2))) == {}
        assert live.take() is None
    assert live.health == UP


@pytest.mark.parametrize("kind", range(Finding.NUM))
def test_a_finding_puts_up_to_0_until_a_check_without_one(kind: int) -> None:
    live = liveness()
    assert live.note(checked(check(findings=[(0, 1, kind)]))) == {Stage.ROUTING: 1}
    assert live.take() == Health(0, False, 1)
    assert live.take() is None
    live.note(report(Row("a")))
    assert live.take() is None, "a step that is not checked says nothing"
    assert live.note(checked(check())) == {}
    assert live.take() == UP


def test_blind_layers_are_counted_and_named_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    live = liveness()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            live.note(checked(check(silent=[0, 1])))
        live.note(checked(check()))
    assert live.silent is False
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "MoE layers 3, 5" in caplog.messages[0]
    assert "report nothing" in caplog.messages[0]


def test_a_mask_that_was_not_obeyed_keeps_up_at_0_until_a_restart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = liveness()
    violation = check(num_actions=2, violations=[(0, 1, 1)])
    assert live.note(checked(violation), MASKS) == {}
    live.note(checked(violation), MASKS)
    assert live.take() == DOWN
    live.note(checked(check(num_actions=2)))
    assert live.take() is None
    assert live.violated == {"moe_guard:q/steer"}
    [message] = caplog.messages
    assert "layers 5, against the masks of q" in message


def test_up_falls_with_a_step_that_is_not_judged_and_rises_with_one_that_is() -> None:
    live = liveness()
    for unjudged in (failed("a"), report(Row("a", judged=Judged.RANKS_DIFFER))):
        live.note(unjudged)
        assert live.take() == DOWN
        live.note(report(Row("a")))
        assert live.take() == UP
    live.note_fault()
    assert live.take() == DOWN


def test_what_the_start_up_proof_did_not_show_no_check_makes_up_for() -> None:
    live = liveness(live=False, blind_layers=2)
    live.note(checked(check()))
    assert live.take() is None
    assert live.health == Health(0, False, 2)


def steer(on_error: str, mode: str = "enforce") -> RuleFacts:
    return rule("steer", "mask", on_error=on_error, mode=mode)


def run(rules: Sequence[RuleFacts], *steps: StepReport) -> tuple[list[dict[str, str]], Delta]:
    """What each step blocks, and the delta when its requests have ended."""
    ledger = Ledger(0, RuleBook("rev-1", tuple(rules), (0,), 1))
    blocked = []
    for step in steps:
        endings = ledger.begin_step(step, everyone)
        blocked.append({req_id: ending.reason for req_id, ending in endings.items()})
        ledger.end_step()
    for req_id in steps[-1].req_ids:
        ledger.finish(req_id)
    delta = ledger.take(idle=True)
    assert delta is not None
    return blocked, delta


VIOLATION = checked(check(2, violations=[(0, 1, 0)] * 3), Row("a", masks=[0]), Row("b"))


def test_a_violated_mask_is_counted_by_policy_and_its_request_does_not_end_as_masked() -> None:
    _, delta = run([steer("open")], report(Row("a", masks=[0])), VIOLATION)
    assert delta.mask_violations == {"p": 3}
    assert delta.outcomes == {"unjudged": 1, "passed": 1}
    assert delta.failures == {}


def test_a_violated_mask_of_a_closed_rule_blocks_its_request_and_no_other() -> None:
    blocked, delta = run([steer("closed")], VIOLATION)
    assert blocked == [{"a": "moe_guard:p/steer"}]
    assert delta.outcomes == {"blocked": 1, "passed": 1}


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_later_requests_under_a_mask_that_was_violated_follow_its_fail_mode_too(on_error: str) -> None:
    later = report(Row("c", masks=[0]), Row("d"))
    blocked, delta = run([steer(on_error)], VIOLATION, later)
    assert blocked[1] == ({"c": "moe_guard:p/steer"} if on_error == "closed" else {})
    assert delta.outcomes == {"blocked" if on_error == "closed" else "unjudged": 1, "passed": 1}


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_a_finding_concerns_the_requests_that_have_it(on_error: str) -> None:
    step = checked(check(2, findings=[(0, 0, Finding.NOT_FINITE)]), Row("a"), Row("b"))
    blocked, delta = run([rule("watch", on_error=on_error)], step)
    assert blocked == [{"a": "moe_guard:p/watch"} if on_error == "closed" else {}]
    assert delta.outcomes == {"blocked" if on_error == "closed" else "unjudged": 1, "passed": 1}
    assert delta.failures == {Stage.ROUTING: 1}


def test_while_a_layer_is_silent_everyone_is_unjudged_in_steps_that_are_not_checked_too() -> None:
    silent = checked(check(1, silent=[0]), Row("a"))
    _, delta = run([rule("watch")], silent, report(Row("b")))
    assert delta.outcomes == {"unjudged": 1}
    _, delta = run([rule("watch")], silent, checked(check(1), Row("b")))
    assert delta.outcomes == {"passed": 1}
