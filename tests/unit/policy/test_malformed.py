"""Malformed policies: the line and column that an author is sent to, and what the message says."""

from __future__ import annotations

import re

import pytest

from guard.policy import Fault, PolicyError, parse_policies

VALID = """\
apiVersion: moe-guard/v1
kind: Policy
metadata:
  name: p
spec:
  experts:
    flagged:
      - {layer: 1, experts: [1, 2-3]}
  rules:
    - name: r
      when:
        rate: {experts: flagged, above: 0.5}
      then:
        mask: {experts: flagged}
"""
WHEN = "rate: {experts: flagged, above: 0.5}"
THEN = "mask: {experts: flagged}"
ENTRY = "{layer: 1, experts: [1, 2-3]}"


def faults_of(text: str) -> tuple[Fault, ...]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text, "p.yaml")
    return caught.value.faults


def test_the_policy_that_the_cases_break_is_valid() -> None:
    assert parse_policies(VALID).policies[0].name == "p"


CASES = [
    # the head
    ("moe-guard/v1", "moe-guard/v2", 1, 13, "apiVersion: expected moe-guard/v1, found text"),
    (
        "kind: Policy",
        "kind: policy",
        2,
        7,
        "Policy, ExpertSets or PolicyTest, found .*did you mean 'Policy'?",
    ),
    ("kind: Policy", "kind: ExpertSets", 9, 3, "spec.rules: unknown key 'rules'; expected profile"),
    ("kind: Policy", "kind: ", 2, 1, "kind: has no value"),
    ("kind: Policy\n", "", 1, 1, "the key 'kind' is missing"),
    ("kind:", "knid:", 2, 1, "unknown key 'knid'; did you mean 'kind'?"),
    # metadata
    ("name: p", "name: Restricted_Chemistry", 4, 9, "metadata.name: expected a name of a-z, 0-9"),
    ("name: p", "name: -p", 4, 9, "expected a name"),
    ("name: p", "name: " + "p" * 64, 4, 9, "at most 63 characters"),
    ("name: p", "name: 12", 4, 9, "expected text, found the number 12; put it in quotes"),
    ("name: p", "severity: low", 4, 3, "metadata: the key 'name' is missing"),
    ("name: p", "name: p\n  severity: hihg", 5, 13, "info, low.*did you mean 'high'?"),
    ("name: p", "name: p\n  maturity: beta", 5, 13, "sandbox, incubating, stable or deprecated"),
    ("name: p", "name: p\n  labels: {v: 1.0}", 5, 15, "metadata.labels.v: expected text"),
    ("name: p", "name: p\n  labels: {1: x}", 5, 12, "a key that is text"),
    ("name: p", "name: p\n  owner: me", 5, 3, "metadata.owner: unknown key 'owner'; expected name"),
    # spec
    ("spec:", "spec:\n  mode: block", 6, 9, "spec.mode: expected off, audit or enforce"),
    ("spec:", "spec:\n  mode: true", 6, 9, "found true"),
    ("spec:", "spec:\n  mode:", 6, 3, "spec.mode: has no value"),
    ("spec:", "spec:\n  onerror: open", 6, 3, "unknown key 'onerror'; did you mean 'onError'?"),
    ("spec:", "spec:\n  onError: fail", 6, 12, "expected open or closed"),
    ("spec:", "spec:\n  profile: a.json", 6, 12, "the profile a.json is no file"),
    ("spec:", "spec:\n  exceptions: {}", 6, 15, "spec.exceptions: expected a list"),
    ("spec:", "spec:\n  model: {topK: 0}", 6, 17, "spec.model.topK: expected at least 1"),
    (
        "spec:",
        "spec:\n  model: {layers: '4'}",
        6,
        19,
        "whole number, found text '4'; take the quotes",
    ),
    ("spec:", "spec:\n  model: Qwen", 6, 10, "spec.model: expected a mapping with keys of archi"),
    # sets
    ("flagged:\n      - " + ENTRY, "flagged: []", 7, 14, "expected at least 1 item.*an empty list"),
    (ENTRY, "{experts: [1]}", 8, 9, "needs exactly one of layer or layers"),
    (ENTRY, "{layer: 1}", 8, 9, "needs exactly one of experts or weights"),
    (ENTRY, "{layer: 1, layers: 2, experts: 1}", 8, 20, "exactly one of layer or layers"),
    (ENTRY, "{layer: 1, experts: 1, weights: {2: 1}}", 8, 32, "exactly one of experts or weights"),
    (ENTRY, "{layer: 1-2, experts: 1}", 8, 17, "one layer number.*write `layers`"),
    (ENTRY, "{layer: -1, experts: 1}", 8, 17, "expected at least 0, found the number -1"),
    (
        ENTRY,
        "{layers: [1, x], experts: 1}",
        8,
        22,
        r"layers\[1\]: expected a layer number such as 7",
    ),
    (ENTRY, "{layer: 1, experts: [1, -2]}", 8, 33, "an expert id from 0 to 65535"),
    (ENTRY, "{layer: 1, experts: [95-90]}", 8, 30, "'95-90' runs backwards; write 90-95"),
    (
        ENTRY,
        "{layer: 1, experts: [1.5]}",
        8,
        30,
        r"flagged\[0\].experts\[0\]: expected an expert id",
    ),
    (ENTRY, "{layer: 1, experts: [true]}", 8, 30, "found true"),
    (ENTRY, "{layer: 1, experts: []}", 8, 29, "expected at least 1 item"),
    (ENTRY, "{layer: 1, weights: {a: 1}}", 8, 30, "expected a key that is a whole number"),
    (ENTRY, "{layer: 1, weights: {1: 2e6}}", 8, 33, r"expected at most 1e\+06"),
    (ENTRY, "{layer: 1, weights: {1: .nan}}", 8, 33, "expected a finite number"),
    (ENTRY, "{layer: 1, weights: {1: high}}", 8, 33, "expected a number, found text 'high'"),
    (ENTRY, "{profile: a.json, set: b}", 8, 19, "the profile a.json is no file"),
    (ENTRY, "{profile: a.json}", 8, 9, "which set of the profile?"),
    (ENTRY, "{set: b}", 8, 15, "'b' is a set of which profile? Name it: profile: PATH"),
    (ENTRY, "{set: b, layer: 1}", 8, 18, "takes a set of a profile has no 'layer'"),
    (ENTRY, "{layers: 0-4095, experts: 0-65535}", 8, 9, "more than 1048576 experts"),
    (
        ENTRY,
        ENTRY + "\n      - {layer: 1, weights: {2: 0.5}}",
        9,
        33,
        "has weight 0.5 here, but 1 above",
    ),
    (ENTRY, "{layer: 1, weights: {2: 0.5}}\n      - " + ENTRY, 9, 29, "weight 1 here, but 0.5"),
    # rules
    ("name: r\n      ", "", 10, 7, r"spec.rules\[0\]: the key 'name' is missing"),
    ("when:\n        " + WHEN, "match: {}", 10, 7, "the key 'when' is missing"),
    ("when:", "whne:", 11, 7, "unknown key 'whne'; did you mean 'when'?"),
    ("name: r", "name: r\n      match: {phase: reply}", 11, 22, "expected prompt, output or any"),
    (
        "name: r",
        "name: r\n      match: {labels: {a: 1}}",
        11,
        27,
        "labels.a: expected text or a list of texts",
    ),
    ("name: r", "name: r\n      match: {sample: 0}", 11, 23, "sample: expected more than 0"),
    ("name: r", "name: r\n      match: {sample: 10}", 11, 23, "sample: expected at most 1"),
    ("name: r", "name: r\n      match: {tenant: x}", 11, 15, r"label: labels: \{tenant: NAME\}"),
    ("name: r", "name: r\n      persist: {hits: 4, of: 3}", 11, 23, "4 hits cannot happen in 3"),
    ("name: r", "name: r\n      persist: {hits: 1, of: 65}", 11, 30, "of: expected at most 64"),
    ("name: r", "name: r\n      persist: {hits: 0, of: 2}", 11, 23, "hits: expected at least 1"),
    ("name: r", "name: r\n      persist: {hits: 1}", 11, 16, "the key 'of' is missing"),
    (
        "    - name: r",
        "    - {name: r, when: always}\n    - name: r",
        11,
        13,
        "rule 'r' is already def",
    ),
    # conditions
    (WHEN, "{}", 12, 9, "when: a condition needs exactly one of always, count"),
    (WHEN, "rat: {}", 12, 9, "when.rat: unknown key 'rat'; did you mean 'rate'?"),
    (WHEN, WHEN + "\n        always: {}", 13, 9, "'rate' is given; join several with all or any"),
    (WHEN, "all: []", 12, 14, "when.all: expected at least 1 item"),
    (WHEN, "any: {always: {}}", 12, 14, "when.any: expected a list, found a mapping"),
    (WHEN, "any: [always, {rate: {}}]", 12, 30, r"when.any\[1\].rate: .*'experts' is missing"),
    (WHEN, "always: false", 12, 17, r"when.always: expected \{\} or true, found false"),
    (WHEN, "always: {experts: flagged}", 12, 18, "unknown key 'experts'; expected no key"),
    (WHEN, "rate: {experts: flaged, above: 1}", 12, 25, "no set 'flaged'; did you mean 'flagged'?"),
    (WHEN, "not: {rate: {experts: xyz, above: 1}}", 12, 31, "no set 'xyz'; known: flagged"),
    (
        WHEN,
        "rate: {experts: lib/s, above: 1}",
        12,
        25,
        "there is no set 'lib/s'; no ExpertSets were loaded with it",
    ),
    (WHEN, "rate: {experts: [1], above: 1}", 12, 25, "expected the name of a set in spec.experts"),
    (WHEN, "rate: {experts: flagged}", 12, 15, "of above, atLeast, below, atMost or budget"),
    (WHEN, "rate: {experts: flagged, above: 1, below: 2}", 12, 44, "exactly one of above"),
    (WHEN, "rate: {experts: flagged, at_least: 1}", 12, 34, "did you mean 'atLeast'?"),
    (WHEN, "rate: {experts: flagged, above: .inf}", 12, 41, "expected a finite number"),
    (WHEN, "rate: {experts: flagged, above: '1'}", 12, 41, "found text '1'; take the quotes off"),
    (WHEN, "rate: {experts: flagged, above: yes}", 12, 41, "expected a number, found text 'yes'"),
    (WHEN, "rate: {experts: flagged, above: true}", 12, 41, "expected a number, found true"),
    (WHEN, "rate: {experts: flagged, budget: 0.01}", 12, 42, "name one in spec.profile"),
    (WHEN, "rate: {experts: flagged, budget: 1}", 12, 42, "budget: expected less than 1"),
    (WHEN, "rate: {experts: flagged, above: 1, bias: 2}", 12, 44, "only `score` takes a bias"),
    (WHEN, "rate: {experts: flagged, above: 1, over: 4097}", 12, 50, "from 1 to 4096"),
    (WHEN, "rate: {experts: flagged, above: 1, over: 0}", 12, 50, "from 1 to 4096"),
    (WHEN, "rate: {experts: flagged, above: 1, over: requst}", 12, 50, "did you mean 'request'?"),
    (WHEN, "rate: {experts: flagged, above: 1, minTokens: 0}", 12, 55, "expected at least 1"),
    (
        WHEN,
        "rate: {experts: flagged, above: 1, over: 4, minTokens: 5}",
        12,
        64,
        "a window of 4 never holds 5 tokens",
    ),
    (WHEN, "coactivation: {experts: flagged, above: 1}", 12, 23, "exactly one of members or layers"),
    (WHEN, "coactivation: {experts: f, members: 1, layers: 1, above: 1}", 12, 48, "exactly one of m"),
    (WHEN, "dormant: {above: 1}", 12, 18, "the key 'baselineBelow' is missing"),
    (WHEN, "dormant: {baselineBelow: 0, above: 1}", 12, 34, "expected more than 0"),
    (WHEN, "dormant: {baselineBelow: 0.1, above: 1}", 12, 9, "dormant.*name a profile in spec.profile"),
    (WHEN, "suppressed: {experts: flagged, above: 1}", 12, 9, "compares with a profile's baselines"),
    (WHEN, "divergence: {above: 0.1}", 12, 9, "compares with a profile's baselines"),
    (WHEN, "divergence: {reduce: min, above: 0.1}", 12, 30, "expected max or mean"),
    (WHEN, "entropy: {experts: flagged, below: 2}", 12, 19, "unknown key 'experts'"),
    (WHEN, "probe: {above: 0.5}", 12, 9, "`probe` is a profile's; name a profile in spec.profile"),
    # actions
    (THEN, "blok: {}", 14, 9, "then.blok: unknown key 'blok'; did you mean 'block'?"),
    (THEN, THEN + "\n        block: {}", 15, 9, "'mask' is given; write a rule for each action"),
    (THEN, "block: {text: x}", 14, 17, "then.block.text: unknown key 'text'; expected message"),
    (THEN, "mask: {experts: other}", 14, 25, "then.mask.experts: there is no set 'other'"),
    (THEN, "mask: {experts: flagged, until: never}", 14, 41, "request-end, clear or a number"),
    (
        THEN,
        "mask: {experts: flagged, until: 0}",
        14,
        41,
        "tokens of at least 1, found the number 0",
    ),
    (THEN, "mask: {experts: flagged, method: reorute}", 14, 42, "did you mean 'reroute'?"),
    (
        THEN,
        "mask: {experts: flagged, method: drop-renorm}",
        14,
        42,
        "expected reroute, drop_renorm, drop or force, found text 'drop-renorm'; "
        "did you mean 'drop_renorm'?",
    ),
]


@pytest.mark.parametrize(("old", "new", "line", "column", "message"), CASES)
def test_fault_has_its_place_and_says_what_to_write(
    old: str, new: str, line: int, column: int, message: str
) -> None:
    assert old in VALID

    faults = faults_of(VALID.replace(old, new, 1))

    at_place = [f.message for f in faults if f.location[1:] == (line, column)]
    assert any(re.search(message.replace("?", r"\?"), found) for found in at_place), faults


def test_every_fault_of_a_policy_is_reported_in_one_run() -> None:
    text = VALID.replace("name: p", "name: P").replace("layer: 1", "layer: x")
    text = text.replace("rate: {experts: flagged, above", "rate: {experts: flaged, abov")
    text = text.replace(THEN, "mask: {experts: flagged, method: drp, until: no}")

    places = [fault.location[1:] for fault in faults_of(text)]

    assert places == [(4, 9), (8, 17), (12, 25), (12, 33), (14, 42), (14, 54)]


def test_second_of_two_policies_of_one_name_is_the_fault_and_names_the_first() -> None:
    (fault,) = faults_of(VALID + "---\n" + VALID)

    assert str(fault).startswith("p.yaml:19:9: metadata.name: the policy 'p' is already defined at")
    assert "p.yaml:4:9" in fault.message


def test_two_policies_of_one_name_are_found_even_where_one_is_malformed() -> None:
    faults = faults_of(VALID + "---\n" + VALID.replace("spec:", "spec:\n  mode: x"))

    assert [fault.location.line for fault in faults] == [19, 21]


@pytest.mark.parametrize("text", ["just text", "[1, 2]", "12"])
def test_document_that_is_no_mapping_is_refused(text: str) -> None:
    (fault,) = faults_of(text)

    assert "expected a mapping with keys of apiVersion, kind, metadata, spec" in fault.message
    assert fault.location[1:] == (1, 1)


def test_document_of_another_kind_has_only_that_fault() -> None:
    (fault,) = faults_of("apiVersion: moe-guard/v1\nkind: ConfigMap\nsets: {a: []}\n")

    assert "kind: expected Policy, ExpertSets or PolicyTest, found text 'ConfigMap'" in fault.message
