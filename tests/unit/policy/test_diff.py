"""What `compare` says of two policy sets: each change once, with the side that it moves to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy import parse_policies
from guard.policy.diff import Change, Effect, compare

BASE = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: p, severity: high}
spec:
  mode: audit
  experts:
    flagged: [{layer: 1, experts: [1, 2-3]}]
    other: [{layer: 2, experts: [4]}]
  rules:
    - name: burst
      match: {phase: output, labels: {tier: [free, trial]}}
      when: {rate: {experts: flagged, over: 64, minTokens: 16, above: 0.12}}
      persist: {hits: 2, of: 3}
      then: {mask: {experts: flagged, until: 64}}
    - name: stop
      when:
        all:
          - count: {experts: other, over: request, atLeast: 10}
          - not: {count: {experts: flagged, over: token, atMost: 0}}
      then: {block: {message: no}}
  exceptions:
    - {name: red, match: {labels: {tenant: red}}, rules: [stop], until: 2027-03-31}
"""
RATE = "{rate: {experts: flagged, over: 64, minTokens: 16, above: 0.12}}"
STRICTER, LOOSER, OTHER = Effect


def changes(old: str, new: str, base: str = BASE) -> list[Change]:
    assert old in base
    return compare(parse_policies(base), parse_policies(base.replace(old, new, 1)))


CASES = [
    ("mode: audit", "mode: enforce", STRICTER, "p", "mode: audit → enforce: stop blocks; burst masks"),
    ("mode: audit", "mode: 'off'", LOOSER, "p", "mode: audit → off: stop blocks; burst masks (off)"),
    ("severity: high", "severity: low", OTHER, "p", "severity: high → low"),
    ("severity: high", "description: x, severity: high", OTHER, "p", "description: '' → 'x'"),
    ("severity: high", "severity: high, maturity: stable", OTHER, "p", "maturity: sandbox → stable"),
    ("  experts:\n", "  model: {topK: 2}\n  experts:\n", OTHER, "p", "model: any → topK: 2"),
    ("above: 0.12", "above: 0.1", STRICTER, "p/burst", "above 0.12 → above 0.1, tighter"),
    (
        "above: 0.12",
        "above: 0.2",
        LOOSER,
        "p/burst",
        "`rate` threshold: above 0.12 → above 0.2, looser",
    ),
    ("above: 0.12", "atLeast: 0.12", STRICTER, "p/burst", "above 0.12 → atLeast 0.12, tighter"),
    ("above: 0.12", "below: 0.12", OTHER, "p/burst", "above 0.12 → below 0.12"),
    ("atMost: 0", "atMost: 1", LOOSER, "p/stop", "`count#2` threshold: atMost 0 → atMost 1, looser"),
    ("over: 64", "over: 32", OTHER, "p/burst", "`rate` over: 64 → 32"),
    ("minTokens: 16", "minTokens: 8", STRICTER, "p/burst", "`rate` minTokens: 16 → 8"),
    ("minTokens: 16", "minTokens: 32", LOOSER, "p/burst", "`rate` minTokens: 16 → 32"),
    ("hits: 2, of: 3", "hits: 3, of: 3", LOOSER, "p/burst", "persist: 2 of 3 → 3 of 3"),
    ("hits: 2, of: 3", "hits: 2, of: 4", STRICTER, "p/burst", "persist: 2 of 3 → 2 of 4"),
    ("hits: 2, of: 3", "hits: 3, of: 4", OTHER, "p/burst", "persist: 2 of 3 → 3 of 4"),
    ("phase: output", "phase: any", OTHER, "p/burst", "phase: output → any"),
    (
        "[free, trial]",
        "free",
        LOOSER,
        "p/burst",
        "applies to tier: free (was: tier: free|trial)",
    ),
    (", labels: {tier: [free, trial]}", "", STRICTER, "p/burst", "applies to every request"),
    ("{tier: [free, trial]}}", "{tier: [free, trial]}, sample: 0.5}", LOOSER, "p/burst", "sample: 0.5"),
    (RATE, f"{{any: [{RATE}]}}", OTHER, "p/burst", "fires when any (rate of flagged over 64"),
    (RATE, RATE.replace("flagged", "other"), OTHER, "p/burst", "`rate` reads other (was: flagged)"),
    (
        "          - not:",
        "          - mass: {experts: other, above: 0.5}\n          - not:",
        LOOSER,
        "p/stop",
        "fires when all (",
    ),
    (
        "          - not: {count: {experts: flagged, over: token, atMost: 0}}\n",
        "",
        STRICTER,
        "p/stop",
        "fires when all (count of other over request atLeast 10) (was: all (count",
    ),
    ("until: 64", "until: request-end", STRICTER, "p/burst", "mask until: 64 tokens → request-end"),
    ("until: 64", "until: 32", LOOSER, "p/burst", "mask until: 64 tokens → 32 tokens"),
    ("until: 64", "until: clear", OTHER, "p/burst", "mask until: 64 tokens → clear"),
    ("until: 64", "method: drop, until: 64", OTHER, "p/burst", "mask method: reroute → drop"),
    (
        "mask: {experts: flagged",
        "mask: {experts: other",
        OTHER,
        "p/burst",
        "masks other (was: flagged): also L2 E4; no longer L1 E1-3",
    ),
    ("message: no", "message: yes", OTHER, "p/stop", "block message: 'no' → 'yes'"),
    (
        "block: {message: no}",
        "observe",
        LOOSER,
        "p/stop",
        "now observes, and no longer blocks",
    ),
    (
        "mask: {experts: flagged, until: 64}",
        "block: {message: no}",
        STRICTER,
        "p/burst",
        "now blocks, and no longer masks flagged (reroute, until 64 tokens)",
    ),
    ("name: stop", "onError: closed\n      name: stop", STRICTER, "p/stop", "onError: open → closed"),
    ("name: stop", "name: halt", OTHER, "p/halt", "rule renamed from stop; it says the same"),
    ("rules: [stop], ", "", LOOSER, "p/red", "exception covers rules: stop → all"),
    ("2027-03-31", "2027-06-30", LOOSER, "p/red", "extended: until 2027-03-31 → 2027-06-30"),
    ("2027-03-31", "2027-03-01", STRICTER, "p/red", "shortened: until 2027-03-31 → 2027-03-01"),
    (", until: 2027-03-31", "", LOOSER, "p/red", "until 2027-03-31 → for good"),
    ("tenant: red", "tenant: [red, blue]", LOOSER, "p/red", "exception for tenant: blue|red"),
    ("[1, 2-3]", "[1, 2-4]", OTHER, "p/flagged", "set changed: gained L1 E4"),
    (
        "[{layer: 2, experts: [4]}]",
        "[{layer: 2, experts: [5]}]",
        OTHER,
        "p/other",
        "gained L2 E5; lost L2 E4",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "effect", "subject", "message"), CASES, ids=[f"{n}" for n in range(len(CASES))]
)
def test_one_change_is_said_once_with_its_side(
    old: str, new: str, effect: Effect, subject: str, message: str
) -> None:
    base = BASE.replace("rules: [stop], ", "") if "rename" in message else BASE
    (change,) = changes(old, new, base)

    assert (change.effect, change.subject) == (effect, subject)
    assert message in change.message


@pytest.mark.parametrize(("old", "new", "effect", "subject", "message"), CASES[6:8])
def test_the_way_back_is_the_opposite(
    old: str, new: str, effect: Effect, subject: str, message: str
) -> None:
    changed = parse_policies(BASE.replace(old, new, 1))

    (change,) = compare(changed, parse_policies(BASE))

    assert change.effect is effect.reversed


def test_equal_content_is_no_change() -> None:
    shuffled = "# a comment\n" + BASE.replace("[1, 2-3]", "[3, 1-2]")

    assert compare(parse_policies(BASE), parse_policies(shuffled)) == []


def test_rules_that_come_and_go() -> None:
    head, first, second = BASE.partition("    - name: stop")
    exceptions = second[second.index("  exceptions:") :]
    without = parse_policies(head + exceptions.replace("[stop]", "[burst]"))

    removed = [c for c in compare(parse_policies(BASE), without) if c.subject == "p/stop"]
    added = [c for c in compare(without, parse_policies(BASE)) if c.subject == "p/stop"]

    assert [(c.effect, c.what) for c in removed + added] == [(LOOSER, "removed"), (STRICTER, "added")]
    assert removed[0].message.startswith("rule removed: no longer blocks when all (count of other")
    assert added[0].message.endswith("(audit: withheld)")
    assert first


def test_policies_that_come_go_and_are_renamed() -> None:
    enforced = BASE.replace("audit", "enforce")
    second = enforced.replace("name: p,", "name: q,").replace("0.12", "0.2")
    both = parse_policies(f"{enforced}---\n{second}")

    (added,) = compare(parse_policies(enforced), both)
    (removed,) = compare(both, parse_policies(enforced))
    (renamed,) = compare(
        parse_policies(enforced), parse_policies(enforced.replace("name: p,", "name: z,"))
    )

    assert (added.effect, added.subject) == (STRICTER, "q")
    assert added.message == "policy added (enforce): stop blocks; burst masks"
    assert (removed.effect, removed.message) == (
        LOOSER,
        "policy removed (it was enforce): no longer stop blocks; burst masks",
    )
    assert (renamed.effect, renamed.what, renamed.subject) == (OTHER, "renamed", "z")


def test_a_policy_in_audit_that_comes_finds_more() -> None:
    (added,) = compare(
        parse_policies(BASE), parse_policies(f"{BASE}---\n{BASE.replace('name: p,', 'name: q,')}")
    )

    assert added.effect is STRICTER
    assert added.message.endswith("(audit: withheld)")


def test_exceptions_that_come_and_go() -> None:
    line = BASE[BASE.index("  exceptions:") :]
    without = parse_policies(BASE.replace(line, ""))

    (added,) = compare(without, parse_policies(BASE))
    (removed,) = compare(parse_policies(BASE), without)

    assert (added.effect, removed.effect) == (LOOSER, STRICTER)
    assert added.message == "exception added: stop do not act for tenant: red, until 2027-03-31"


def test_more_experts_to_take_out_or_to_count_are_stricter() -> None:
    text = BASE.replace("rate: {experts: flagged", "rate: {experts: other").replace(
        "- not: {count: {experts: flagged, over: token, atMost: 0}}", "- always"
    )
    wider = parse_policies(text.replace("[1, 2-3]", "[1-5]"))

    (gained,) = compare(parse_policies(text), wider)
    (lost,) = compare(wider, parse_policies(text))

    assert (gained.effect, gained.message) == (STRICTER, "set changed: gained L1 E4-5")
    assert (lost.effect, lost.message) == (LOOSER, "set changed: lost L1 E4-5")


def test_stricter_changes_come_first() -> None:
    new = BASE.replace("0.12", "0.2").replace("mode: audit", "mode: enforce").replace("high", "low")

    found = compare(parse_policies(BASE), parse_policies(new))

    assert [change.effect for change in found] == [STRICTER, LOOSER, OTHER]


def test_rules_in_another_order_decide_in_another() -> None:
    start, end = BASE.index("    - name: burst"), BASE.index("  exceptions:")
    middle = BASE.index("    - name: stop")
    swapped = BASE[:start] + BASE[middle:end] + BASE[start:middle] + BASE[end:]

    (change,) = compare(parse_policies(BASE), parse_policies(swapped))

    assert (change.effect, change.what) == (OTHER, "order")


@given(st.lists(st.sampled_from(CASES), max_size=3), st.lists(st.sampled_from(CASES), max_size=3))
@settings(max_examples=100, deadline=None)
def test_there_are_changes_exactly_where_the_revisions_differ(
    one: list[tuple[str, str, Effect, str, str]], other: list[tuple[str, str, Effect, str, str]]
) -> None:
    texts = []
    for edits in (one, other):
        text = BASE.replace("rules: [stop], ", "")
        for old, new, *_ in edits:
            text = text.replace(old, new, 1)
        texts.append(text)
    try:
        old_set, new_set = map(parse_policies, texts)
    except ValueError:
        return  # edits that do not go together

    assert bool(compare(old_set, new_set)) == (old_set.revision != new_set.revision)
