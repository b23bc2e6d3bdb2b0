"""A program takes the place of another one between two steps: what goes on, what ends, what begins."""

from __future__ import annotations

import pytest
import torch

from guard.device.layout import Capacity
from guard.errors import ReloadRefusedError
from guard.policy import parse_policies
from guard.program.applicability import RequestFacts
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.step_report import EventColumn, RequestColumn, StepReport
from guard.runtime import Guard
from tests.unit.device.driving import (
    BLOCK,
    COUNT,
    FLAGGED,
    MASK,
    OTHER,
    TOPOLOGY,
    Engine,
    block_position,
    fired,
    policy_text,
    rule_text,
)

REQUEST = "{count: {experts: f, over: request, atLeast: 3}}"
LONGER = "{count: {experts: f, over: 4, atLeast: 3}}"
SHORT = "{count: {experts: f, over: 2, atLeast: 2}}"
NEVER_TRUE = "{count: {experts: f, over: token, atLeast: 9}}"
ALWAYS = "{always: {}}"
EMPTY = policy_text(rule_text(COUNT), mode="off")


class ReloadingEngine(Engine):
    def reload(self, text: str, computed: dict[str, int] | None = None) -> Program:
        program = compile_policies(parse_policies(text), TOPOLOGY, self.guard.program)
        self.guard.install(self.guard.prepare(program), computed)
        return program

    def output(self, req_id: str, position: int, expert: int) -> StepReport:
        return self.step({req_id: (position, [expert])})


def unseen(report: StepReport) -> list[int]:
    return [int(event[EventColumn.UNSEEN]) for event in report.events_V]


def started(text: str, prompt: int = 1, max_slots: int = 4) -> ReloadingEngine:
    engine = ReloadingEngine(text, max_slots=max_slots)
    engine.guard.add_request("a", prompt)
    return engine


def test_a_rule_that_stays_keeps_its_window_among_new_neighbours() -> None:
    engine = started(policy_text(rule_text(REQUEST)))
    engine.step({"a": (0, [FLAGGED])})
    engine.output("a", 1, FLAGGED)
    program = engine.reload(policy_text(rule_text(ALWAYS, name="first") + rule_text(REQUEST)))

    report = engine.output("a", 2, FLAGGED)

    assert report.revision == program.revision
    assert [int(e[EventColumn.RULE]) for e in report.events_V] == [0, 1]
    assert unseen(report) == [0, 0]


def test_a_new_signal_counts_from_the_reload_on_and_says_what_it_did_not_see() -> None:
    engine = started(policy_text(rule_text(NEVER_TRUE)))
    engine.step({"a": (0, [FLAGGED])})
    engine.output("a", 1, FLAGGED)
    other = policy_text(rule_text(REQUEST)).replace("[3]", "[3, 4]")
    engine.reload(other)

    assert not fired(engine.output("a", 2, FLAGGED))
    assert not fired(engine.output("a", 3, FLAGGED))
    report = engine.output("a", 4, FLAGGED)
    assert (fired(report), unseen(report)) == ([("a", 4)], [2])
    assert report.requests_B[0, RequestColumn.UNSEEN] == 0
    assert report.requests_B[0, RequestColumn.LATE] == 2


def test_a_longer_window_over_a_known_signal_grows_from_what_was_kept() -> None:
    engine = started(policy_text(rule_text(SHORT)))
    engine.step({"a": (0, [FLAGGED])})
    for position in range(1, 4):
        engine.output("a", position, FLAGGED)
    engine.reload(policy_text(rule_text(LONGER)))

    assert fired(engine.output("a", 4, OTHER)) == []
    assert fired(engine.output("a", 5, FLAGGED)) == []  # of the tokens before, one alone was kept
    assert fired(engine.output("a", 6, FLAGGED)) == [("a", 6)]


def test_an_output_window_over_a_known_signal_knows_where_the_prompt_ended() -> None:
    engine = started(policy_text(rule_text(NEVER_TRUE)), prompt=2)
    engine.step({"a": (0, [FLAGGED, FLAGGED])})
    engine.output("a", 2, FLAGGED)
    engine.reload(policy_text(rule_text("{count: {experts: f, over: output, atLeast: 2}}")))

    assert fired(engine.output("a", 3, FLAGGED)) == [("a", 3)]


def test_a_rule_that_stays_fires_once_for_what_held_before_and_a_changed_one_again() -> None:
    two = rule_text(COUNT, name="stays") + rule_text(COUNT, name="changes")
    engine = started(policy_text(two))
    assert len(fired(engine.step({"a": (0, [FLAGGED])}))) == 2
    engine.reload(policy_text(two.replace("changes, when", "changes, persist: {hits: 1, of: 2}, when")))

    report = engine.output("a", 1, FLAGGED)
    assert [int(e[EventColumn.RULE]) for e in report.events_V] == [1]


def test_a_mask_ends_with_its_rule_and_stays_with_one_that_stays() -> None:
    text = policy_text(rule_text(COUNT, MASK))
    engine = started(text)
    engine.step({"a": (0, [FLAGGED])})
    engine.output("a", 1, OTHER)
    assert engine.masked_rows(1) == [True]

    engine.reload(policy_text(rule_text(ALWAYS, name="z") + rule_text(COUNT, MASK)))
    engine.output("a", 2, OTHER)
    assert engine.masked_rows(1) == [True]

    engine.reload(policy_text(rule_text(ALWAYS, name="z")))
    engine.output("a", 3, OTHER)
    assert engine.masked_rows(1) == [False]


def test_a_mask_that_is_newly_in_audit_ends_and_is_repeated_in_a_recompute() -> None:
    text = policy_text(rule_text(COUNT, MASK))
    engine = started(text)
    engine.step({"a": (0, [FLAGGED])})
    engine.output("a", 1, OTHER)
    engine.reload(text.replace("mode: enforce", "mode: audit"))
    engine.output("a", 2, OTHER)
    assert engine.masked_rows(1) == [False]

    engine.step({"a": (0, [FLAGGED, OTHER, OTHER, OTHER])})
    assert engine.masked_rows(4) == [False, True, False, False]


@pytest.mark.parametrize("action", [MASK, BLOCK], ids=["mask", "block"])
def test_a_rule_that_holds_acts_when_it_is_newly_enforced(action: str) -> None:
    text = policy_text(rule_text(REQUEST, action), mode="audit")
    engine = started(text, prompt=3)
    assert len(fired(engine.step({"a": (0, [FLAGGED] * 3)}))) == 1
    assert fired(engine.output("a", 3, OTHER)) == []
    engine.reload(text.replace("mode: audit", "mode: enforce"))
    report = engine.output("a", 4, OTHER)

    assert fired(report) == [("a", 4)]
    if action == BLOCK:
        assert block_position(report, 1) == 4
    else:
        engine.output("a", 5, OTHER)
        assert engine.masked_rows(1) == [True]


def test_a_static_mask_holds_from_the_next_position_on_and_only_for_whom_it_is_enforced() -> None:
    engine = started(policy_text(rule_text(COUNT)), prompt=4)
    engine.guard.add_request("b", 4)
    engine.step({"a": (0, [OTHER, OTHER])})
    engine.reload(policy_text(rule_text(COUNT) + rule_text(ALWAYS, MASK, name="m")))
    engine.step({"a": (2, [OTHER, OTHER]), "b": (0, [OTHER])})
    assert engine.masked_rows(3) == [True, True, True]
    engine.step({"a": (0, [OTHER] * 4)})

    assert engine.masked_rows(4) == [False, False, True, True]


def test_a_static_mask_goes_on_over_a_reload_that_leaves_its_rule_as_it_is() -> None:
    rules = rule_text(ALWAYS, "{mask: {experts: f, until: 3}}")
    engine = started(policy_text(rules), prompt=4)
    engine.step({"a": (0, [OTHER, OTHER])})
    engine.reload(policy_text(rules + rule_text(COUNT, name="n")))
    engine.step({"a": (2, [OTHER, OTHER])})

    assert engine.masked_rows(2) == [True, False]


def test_what_a_request_asked_to_have_enforced_is_known_to_later_programs() -> None:
    engine = ReloadingEngine(policy_text(rule_text(NEVER_TRUE)))
    engine.guard.add_request("a", 1, RequestFacts("a", enforced=frozenset({"p"})))
    engine.guard.add_request("b", 1)
    engine.step({"a": (0, [OTHER]), "b": (0, [OTHER])})
    engine.reload(policy_text(rule_text(COUNT, BLOCK), mode="audit"))
    report = engine.step({"a": (1, [FLAGGED]), "b": (1, [FLAGGED])})

    assert [block_position(report, 1, row) for row in (0, 1)] == [1, None]


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "goes"])
def test_a_block_decided_in_a_prompt_acts_at_its_end_if_its_rule_is_still_there(stays: bool) -> None:
    block = rule_text(COUNT, BLOCK, name="b")
    engine = started(policy_text(block), prompt=4)
    engine.step({"a": (0, [FLAGGED, OTHER])})
    new = rule_text(NEVER_TRUE, name="new")
    engine.reload(policy_text(new + (block if stays else "")))
    report = engine.step({"a": (2, [OTHER, OTHER])})

    assert block_position(report, 2 if stays else 1) == (3 if stays else None)
    if stays:
        assert report.requests_B[0, RequestColumn.BLOCK_KEY] == 3 * 2 + 1


def test_the_second_of_two_blocks_acts_where_the_first_ones_rule_is_removed() -> None:
    first, second = rule_text(COUNT, BLOCK, name="b1"), rule_text(REQUEST, BLOCK, name="b2")
    engine = started(policy_text(first + second), prompt=6)
    engine.step({"a": (0, [FLAGGED] * 3)})
    engine.reload(policy_text(second))
    report = engine.step({"a": (3, [OTHER, OTHER, OTHER])})

    assert block_position(report, 1) == 5


def test_a_block_that_is_decided_stands_though_another_rules_earlier_one_goes() -> None:
    token = "{count: {experts: f, over: token, atLeast: 1}}"
    goes, stays = rule_text(COUNT, BLOCK, name="goes"), rule_text(token, BLOCK, name="stays")
    engine = started(policy_text(goes + stays), prompt=6)
    engine.step({"a": (0, [FLAGGED, OTHER, OTHER])})
    engine.reload(policy_text(stays))
    report = engine.step({"a": (3, [OTHER, OTHER, OTHER])})

    assert (fired(report), block_position(report, 1)) == ([], 5)


def test_a_new_rule_that_does_not_apply_to_a_request_leaves_it_judged() -> None:
    engine = started(policy_text(rule_text(NEVER_TRUE)))
    engine.step({"a": (0, [FLAGGED])})
    new = rule_text(REQUEST).replace("name: ", "match: {labels: {tenant: x}}, name: ", 1)
    engine.reload(policy_text(new).replace("[3]", "[3, 4]"))

    assert engine.output("a", 1, FLAGGED).requests_B[0, RequestColumn.LATE] == 0


def test_slots_that_were_added_are_there_after_a_time_without_rules() -> None:
    engine = started(policy_text(rule_text(COUNT)), max_slots=1)
    engine.guard.add_request("b", 1)  # one more than there is room for
    engine.reload(EMPTY)
    engine.reload(policy_text(rule_text(COUNT)), {"a": 0, "b": 0})
    report = engine.step({"a": (0, [FLAGGED]), "b": (0, [FLAGGED])})

    assert fired(report) == [("a", 0), ("b", 0)]


def test_a_guard_that_started_without_rules_follows_what_was_under_way() -> None:
    engine = started(EMPTY, prompt=2)
    for position in range(4):
        engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([position]))
        assert engine.guard.end_step() is None
    program = engine.reload(policy_text(rule_text(COUNT, MASK)), {"a": 4})
    again = engine.step({"a": (0, [FLAGGED] * 4)})  # preempted: these were computed before
    assert (fired(again), again.revision) == ([], program.revision)
    report = engine.output("a", 4, FLAGGED)

    assert (fired(report), unseen(report)) == ([("a", 4)], [4])
    assert report.requests_B[0, RequestColumn.LATE] == 4
    assert report.requests_B[0, RequestColumn.UNSEEN] == 0  # no fault, for which one would block
    engine.output("a", 5, OTHER)
    assert engine.masked_rows(1) == [True]


def test_all_rules_can_go_and_others_come_while_a_request_runs() -> None:
    engine = started(policy_text(rule_text(ALWAYS, MASK)))
    engine.step({"a": (0, [OTHER])})
    engine.reload(EMPTY)
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([1]))
    assert engine.guard.end_step() is None
    assert engine.masked_rows(1) == [False]
    engine.reload(policy_text(rule_text(COUNT)), {"a": 2})

    assert fired(engine.output("a", 2, FLAGGED)) == [("a", 2)]


def test_slots_that_were_added_while_a_program_was_prepared_are_carried_over() -> None:
    engine = started(policy_text(rule_text(REQUEST)), max_slots=1)
    engine.step({"a": (0, [FLAGGED])})
    program = compile_policies(
        parse_policies(policy_text(rule_text(REQUEST) + rule_text(ALWAYS, name="z"))),
        TOPOLOGY,
        engine.guard.program,
    )
    prepared = engine.guard.prepare(program)
    engine.guard.add_request("b", 1)
    engine.step({"b": (0, [FLAGGED])})
    engine.guard.install(prepared)
    engine.step({"a": (1, [FLAGGED]), "b": (1, [FLAGGED])})

    report = engine.step({"a": (2, [FLAGGED]), "b": (2, [FLAGGED])})
    assert fired(report) == [("a", 2), ("b", 2)]


def test_steps_between_the_parts_of_preparing_are_judged_as_before_and_carried_over() -> None:
    engine = started(policy_text(rule_text(REQUEST)))
    engine.step({"a": (0, [FLAGGED])})
    later = policy_text(rule_text(REQUEST) + rule_text(ALWAYS, name="z"))
    before = engine.guard.program
    program = compile_policies(parse_policies(later), TOPOLOGY, before)
    parts = 0
    for prepared in engine.guard.prepare_in_parts(program):  # noqa: B007
        parts += 1
        engine.step({"a": (parts, [FLAGGED if parts == 1 else OTHER])})
        assert engine.guard.program is before
    assert parts > 1
    assert prepared is not None
    engine.guard.install(prepared)

    assert fired(engine.step({"a": (parts + 1, [FLAGGED])})) == [("a", parts + 1)] * 2


def masks_text(count: int) -> str:
    rules = "".join(
        rule_text(f"{{count: {{experts: f, over: token, atLeast: {n + 1}}}}}", MASK, name=f"m{n}")
        for n in range(count - 1)
    )
    return policy_text(rules + rule_text(COUNT, MASK, name="last"))


def test_200_mask_actions_at_once_are_honoured_and_257_are_refused_by_their_limit() -> None:
    program = compile_policies(parse_policies(policy_text(rule_text(COUNT))), TOPOLOGY)
    engine = ReloadingEngine.__new__(ReloadingEngine)
    engine.guard = Guard(program, Capacity(64, 4, mask_words=4), torch.device("cpu"))
    engine.guard.add_request("a", 1)
    engine.step({"a": (0, [FLAGGED])})
    engine.reload(masks_text(200))
    engine.output("a", 1, FLAGGED)
    report = engine.output("a", 2, OTHER)

    assert engine.masked_rows(1) == [True]
    assert int(report.masked_BW[0, 3]) >> (199 % 64) & 1
    before = engine.guard.program
    with pytest.raises(ReloadRefusedError, match=r"257 mask actions.* room for 256"):
        engine.reload(masks_text(257))
    assert engine.guard.program is before


def test_a_program_is_refused_in_a_step_and_behind_another_one_than_it_was_made_for() -> None:
    engine = started(policy_text(rule_text(COUNT)))
    text = policy_text(rule_text(REQUEST))
    late = engine.guard.prepare(compile_policies(parse_policies(text), TOPOLOGY, engine.guard.program))
    engine.guard.begin_step(["a"], torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ReloadRefusedError, match="a step is under way"):
        engine.guard.install(late)
    engine.guard.idle()
    engine.reload(text)
    with pytest.raises(ReloadRefusedError, match="generation 0, but generation 1 is in force"):
        engine.guard.install(late)


def test_what_a_request_is_exempt_from_and_what_it_matches_is_derived_anew() -> None:
    """For requests under way too, from what was known of them when they came."""
    exception = "  exceptions: [{name: e, match: {labels: {tenant: red}}}]\n"
    every = rule_text(COUNT, BLOCK)
    of_blue = rule_text(COUNT, BLOCK, rest=", match: {labels: {tenant: blue}}")
    engine = ReloadingEngine(policy_text(rule_text(NEVER_TRUE)))
    engine.guard.add_request("a", 1, RequestFacts("a", {"tenant": "red"}))
    engine.step({"a": (0, [OTHER])})

    engine.reload(policy_text(every, extra=exception))
    report = engine.step({"a": (1, [FLAGGED])})
    assert report.events_V[:, [EventColumn.ENFORCED, EventColumn.EXEMPT]].tolist() == [[0, 1]]
    assert block_position(report, 1) is None

    engine.reload(policy_text(of_blue))
    assert not len(engine.step({"a": (2, [FLAGGED])}).events_V)

    engine.reload(policy_text(every))
    assert block_position(engine.step({"a": (3, [FLAGGED])}), 1) == 3
