"""Reports that stay in bytes: the ledger says the same of them as of what they hold."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard.events.ledger import Ledger
from guard.events.rulebook import RuleBook
from guard.program.step_report import NEVER, Finding, PackedReport, StepReport, StepSummary
from tests.unit.events.reports import Row, check, everyone, failed, packed, report, rule

RULES = (rule("watch"), rule("steer", "mask"), rule("stop", "block", on_error="closed"))


def make() -> Ledger:
    book = RuleBook("rev-1", RULES, (1,), 1)
    return Ledger(0, book, clock=lambda: 1000.0, timer=lambda: 1000.0)


def told(ledger: Ledger) -> list[dict[str, Any]]:
    deltas = []
    while (delta := ledger.take(idle=True)) is not None:
        made = msgspec.to_builtins(delta)
        for decision in made["decisions"]:
            decision["decision_id"] = ""
        deltas.append(made)
    return deltas


QUIET_ROWS = st.builds(Row, st.sampled_from("abc"), extreme=st.sampled_from([float("nan"), 0.5]))
ROWS = st.builds(
    Row,
    st.sampled_from("abc"),
    prompt=st.integers(0, 3),
    output=st.integers(0, 2),
    selections=st.integers(0, 5),
    extreme=st.sampled_from([float("nan"), 0.5]),
    masks=st.sampled_from([(), (), (), (0,)]),
    masked_from=st.sampled_from([NEVER, NEVER, 4]),
    unseen=st.sampled_from([0, 0, 0, 2]),
    block=st.sampled_from([None, None, None, (3, 2)]),
    events=st.sampled_from([(), (), (), ((0, 3, True),)]),
)
STEPS = st.lists(
    st.tuples(
        st.one_of(
            *(
                st.lists(rows, min_size=1, max_size=3, unique_by=lambda row: row.req_id).map(
                    lambda made: report(*made)
                )
                for rows in (QUIET_ROWS, QUIET_ROWS, ROWS)
            ),
            st.just(failed("a", "b")),
        ),
        st.sets(st.sampled_from("abc")),  # who has ended before
        st.sets(st.sampled_from("abc")),  # who ends with the step
        st.booleans(),  # something is taken behind it
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
@example(
    [
        (report(Row("a", masks=(0,))), set(), set(), False),  # a mask that the next step lifts
        (report(Row("a")), set(), set(), True),
    ]
)
@example(  # masks that stay, until one of the requests is there alone, and until they end
    [(report(Row("a", masks=(0,)), Row("b", masks=(0,), masked_from=4)), set(), set(), False)] * 3
    + [(report(Row("b", masks=(0,), masked_from=4)), set(), set(), True)] * 2
    + [(report(Row("a", masks=(0,)), Row("b", masks=(0,), masked_from=4)), set(), {"a"}, True)]
    + [(report(Row("b", masks=(0,), masked_from=5)), set(), {"b"}, True)]
)
def test_a_packed_report_counts_as_what_it_holds(steps: Any) -> None:
    plain, ours = make(), make()
    starts: dict[str, int] = {}
    for step, gone, ends, is_taken in steps:

        def rows_of(req_ids: Any, gone: Any = gone) -> dict[str, int]:
            return {req_id: row for row, req_id in enumerate(req_ids) if req_id not in gone}

        plain.note_step(step)
        blocked = plain.begin_step(step, rows_of)
        as_bytes = step if step.failed or step.num_events else packed(step)
        accepts_all = gone.isdisjoint(step.req_ids)
        if isinstance(as_bytes, PackedReport) and accepts_all and ours.take_quiet_step(as_bytes):
            assert not blocked
            assert plain.mask_starts().items() <= starts.items(), "they were said before"
        else:
            ours.note_step(as_bytes)
            assert ours.begin_step(as_bytes, rows_of) == blocked
            starts = ours.mask_starts()
            assert plain.mask_starts() == starts
        assert ours.has_seen_all == plain.has_seen_all
        for req_id in sorted(ends - gone):
            plain.finish(req_id)
            ours.finish(req_id)
        plain.end_step()
        ours.end_step()
        if is_taken:
            assert told(ours) == told(plain)
    assert told(ours) == told(plain)


def test_a_quiet_report_is_not_taken_apart_until_a_request_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[PackedReport] = []
    stock = PackedReport.unpacked

    def unpacked(self: PackedReport) -> StepReport:
        opened.append(self)
        return stock(self)

    monkeypatch.setattr(PackedReport, "unpacked", unpacked)
    ledger, steps = make(), [packed(report(Row("a"), Row("b", extreme=0.5))) for _ in range(4)]
    for step in steps[:3]:
        assert ledger.take_quiet_step(step)
        ledger.end_step()
    assert not opened
    assert ledger.take_quiet_step(steps[3])
    ledger.finish("b")
    assert opened == [steps[3]]
    [delta] = told(ledger)
    assert delta["tokens"]["output"] == 8
    assert [values for *_, values in delta["values"]] == [[0.5]] * 3


def test_a_step_under_the_masks_of_the_one_before_is_quiet() -> None:
    def take(ledger: Ledger, *rows: Row) -> bool:
        step = packed(report(*rows))
        is_quiet = ledger.take_quiet_step(step)
        if not is_quiet:
            ledger.begin_step(step, everyone)
        ledger.end_step()
        return is_quiet

    masked, begun = Row("a", masks=(0,)), Row("b", masks=(0,), masked_from=4)
    ledger = make()
    assert not take(ledger, masked, begun)
    assert take(ledger, masked, begun)
    assert take(ledger, masked, begun)
    assert not take(ledger, masked, Row("b", masks=(0,), masked_from=5))
    assert not take(ledger, masked)
    assert take(ledger, masked)
    assert not take(ledger, Row("a"))
    assert take(ledger, Row("a"))
    assert not take(ledger, masked)
    ledger.finish("c")
    assert not take(ledger, masked), "something came in between"
    assert take(ledger, masked)


def test_a_step_that_was_checked_is_quiet_unless_an_earlier_check_had_found_something() -> None:
    ledger, step = make(), packed(report(Row("a")), checked=True)

    def is_up() -> bool:
        return ledger.liveness.health.up

    assert ledger.take_quiet_step(step)
    ledger.end_step()
    blind = replace(report(Row("b")), check=check(findings=[(0, 1, Finding.DUPLICATE)]))
    ledger.begin_step(blind, everyone)
    ledger.finish("b")
    ledger.end_step()
    assert not is_up()
    assert not ledger.take_quiet_step(packed(report(Row("a")))), "of a blind guard nothing is quiet"
    assert not ledger.take_quiet_step(step)
    ledger.begin_step(step, everyone)
    ledger.end_step()
    assert is_up()
    assert ledger.take_quiet_step(step)


def test_a_packed_report_crosses_processes_and_its_arrays_can_be_written_to() -> None:
    made = report(Row("a", selections=3, extreme=0.5), Row("b", masks=(0, 1)))
    sent = packed(made)
    sent.begin_s, sent.end_s = 0.1, 0.2
    got = pickle.loads(pickle.dumps(sent))
    unpacked = got.unpacked()
    for name in ("requests_B", "masked_BW", "extremes_BC"):
        np.testing.assert_array_equal(getattr(unpacked, name), getattr(made, name))
    unpacked.requests_B[0, 0] = 7
    assert (got.revision, got.req_ids, got.host) == ("rev-1", ("a", "b"), (0.1, 0.2, 0.0))
    assert unpacked.summary[:4] == StepSummary.of(made)[:4]
    assert np.frombuffer(got.sums, dtype=np.int64).tolist() == made.requests_B.sum(axis=0).tolist()
