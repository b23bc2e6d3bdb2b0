"""Suites run: what is expected is found, and what is not is told with its place and its numbers."""

from __future__ import annotations

from pathlib import Path

from tests.unit.testing.suites import HEADER, POLICY, messages, run

BURST = """\
  - name: a burst is masked
    output:
      - {tokens: 8}
      - {tokens: 8, use: flagged, selections: 4}
      - {tokens: 10}
    expect:
"""


def test_cases_pass_where_all_happens_as_expected(tmp_path: Path) -> None:
    cases = (
        BURST
        + """\
      - {rule: burst, at: output+13}
      - {outcome: masked}
      - {mask: {rule: burst, from: output+14, until: output+20}}
  - name: many selections stop the request
    output: [{tokens: 8, use: flagged, rate: 0.5}]
    expect:
      - {rule: burst, at: 4}
      - {rule: burst/stop, from: 6, to: 6}
      - {outcome: blocked, by: stop}
  - name: benign
    output: [{tokens: 20}]
    expect: nothing
"""
    )
    results = run(tmp_path, cases)
    assert results.faults == ()
    assert messages(results) == []
    assert [case.outcome for case in results.cases] == ["masked", "blocked", "passed"]
    assert results.cases[1].fired == (("burst/burst", 4), ("burst/stop", 6))
    assert results.uncovered == ()


def test_a_decision_that_is_not_listed_fails_the_case(tmp_path: Path) -> None:
    results = run(tmp_path, BURST.replace("expect:", "expect: nothing"))
    assert messages(results) == [
        "burst/burst fired at 14 (rate 0.125, above 0.12), which is not expected"
    ]
    (case,) = results.failed
    assert str(case.mismatches[0].location) == f"{tmp_path}/tests.yaml:5:11"


def test_other_decisions_may_be_allowed(tmp_path: Path) -> None:
    text = BURST.replace("expect:", "also: allowed\n    expect: [{outcome: masked}]")
    assert messages(run(tmp_path, text)) == []


def test_the_evidence_at_the_position_is_told_where_a_rule_did_not_fire(tmp_path: Path) -> None:
    results = run(tmp_path, BURST + "      - {rule: burst, at: 13}\n")
    assert messages(results) == [
        "expected burst/burst to fire at 13; it fired at 14 (rate 0.125, above 0.12). "
        "At 13: rate 0.0833333, above 0.12",
        "burst/burst fired at 14 (rate 0.125, above 0.12), which is not expected",
    ]


def test_the_nearest_value_is_told_where_a_rule_never_fired(tmp_path: Path) -> None:
    results = run(tmp_path, BURST + "      - {rule: burst}\n      - {rule: stop}\n")
    assert messages(results) == [
        "expected burst/stop to fire once; it did not fire. "
        "Nearest to its threshold: count 4, atLeast 9"
    ]


def test_outcomes_and_masks_that_differ_are_told(tmp_path: Path) -> None:
    expected = """\
      - {rule: burst}
      - {outcome: blocked}
      - {mask: {rule: burst, from: 15, until: end}}
      - {mask: {rule: burst, from: output+14, until: end}}
"""
    assert messages(run(tmp_path, BURST + expected)) == [
        "expected outcome blocked, found masked (fired: burst/burst at 14)",
        "expected the mask of burst/burst from 15 to the end; from 15 until 21",
        "expected the mask of burst/burst from 15 to the end; from 15 until 21",
        "burst/burst masked from 15 until 21, which is not expected",
    ]


def test_audit_observes_unless_the_request_enforces(tmp_path: Path) -> None:
    cases = (
        BURST
        + """\
      - {rule: burst}
      - {outcome: observed}
  - name: asked for
    request: {enforce: [burst]}
    output: [{tokens: 8, use: flagged, rate: 0.125}]
    expect: [{rule: burst}, {outcome: masked}]
"""
    )
    policy = POLICY.replace("mode: enforce", "mode: audit")
    assert messages(run(tmp_path, cases, policy=policy)) == []


def test_unseen_tokens_are_not_counted_and_make_the_request_unjudged(tmp_path: Path) -> None:
    cases = """\
  - name: unseen
    output: [{tokens: 8, use: flagged, seen: false}]
    expect: [{outcome: unjudged}]
"""
    assert messages(run(tmp_path, cases)) == []


def test_labels_exceptions_and_dates_decide_as_in_a_server(tmp_path: Path) -> None:
    exception = """\
  exceptions:
    - {name: red-team, match: {labels: {tenant: red-team}}, rules: [stop], until: 2027-03-31}
"""
    cases = """\
  - name: exempt
    request: {labels: {tenant: red-team}, date: 2027-03-31}
    output: [{tokens: 8, use: flagged, rate: 0.5}]
    expect: [{rule: burst}, {rule: stop, exempt: true}, {outcome: masked}]
  - name: expired
    request: {labels: {tenant: red-team}, date: 2027-04-01}
    output: [{tokens: 8, use: flagged, rate: 0.5}]
    expect: [{rule: burst}, {rule: stop, exempt: false}, {outcome: blocked}]
"""
    results = run(tmp_path, cases, policy=POLICY + exception)
    assert results.faults == ()
    assert messages(results) == []


def test_a_rule_without_both_kinds_of_case_is_not_covered(tmp_path: Path) -> None:
    results = run(tmp_path, BURST + "      - {rule: burst}\n")
    assert [(one.rule, one.missing) for one in results.uncovered] == [
        ("burst/burst", ("a case in which it stays silent",)),
        ("burst/stop", ("a case in which it fires",)),
    ]


def test_policies_without_a_suite_are_not_covered(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(POLICY.replace("name: burst,", "name: other,"))
    header = HEADER.replace("kind: PolicyTest", "kind: PolicyTest\npolicies: policy.yaml")
    results = run(tmp_path, BURST + "      - {rule: burst}\n", header=header)
    assert messages(results) == []
    assert [one.rule for one in results.uncovered if len(one.missing) == 2] == [
        "other/burst",
        "other/stop",
    ]
