"""Policies, set files and profiles: edits of three documents that hang together.

Whatever the files hold, loading returns a policy set or raises PolicyError whose faults have a message
and a place in a file that was given; of a policy set, lint and the comparison of two say something. In
a server nothing but a good set comes into force.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hypothesis import strategies as st

from guard.policy import Fault, PolicyError, PolicySet, PolicyTexts, load_texts
from guard.policy.diff import compare
from guard.policy.lint import lint
from guard.policy.texts import Text, with_profiles
from tools.fuzz.part import Part, Parts
from tools.fuzz.policy_server import PolicyServer

POLICY: Final = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: p, description: d, severity: high, maturity: stable, labels: {a: b}}
spec:
  mode: enforce
  onError: closed
  profile: m.json
  model: {architecture: X, layers: 2, experts: 4, topK: 2}
  experts:
    flagged: &f
      - {layer: 0, experts: [1, 2-3]}
      - {layers: 0-1, weights: {1: 1, 2: 1}}
    again: *f
    profiled: [{set: s}, {profile: m.json, set: s}]
  rules:
    - name: r
      match: {phase: output, loraAdapters: [l], labels: {tier: [free, trial]}, sample: 0.5}
      when:
        any:
          - rate: {experts: flagged, over: 64, minTokens: 3, above: 0.5}
          - not: {score: {experts: again, over: prompt, bias: 1, atMost: 2}}
          - all: [{always: {}}, {mass: {experts: sets/a, over: token, below: 0.5}}]
          - coactivation: {experts: profiled, layers: 2, atLeast: 1}
          - suppressed: {experts: profiled, over: request, above: 1}
      persist: {hits: 2, of: 3}
      then: {mask: {experts: flagged, method: drop_renorm, until: 8}}
    - {name: s, when: always, then: {block: {message: no}}, onError: open}
    - {name: t, when: {dormant: {baselineBelow: 0.3, experts: profiled, over: 8, atLeast: 2}}}
    - {name: u, when: {all: [{divergence: {reduce: mean, above: 0.2}}, {probe: {name: q, above: 0.9}}]}}
    - {name: v, when: {any: [{entropy: {below: 2}}, {concentration: {over: 8, above: 1.5}}]}}
    - {name: b, match: {phase: output}, when: {rate: {experts: profiled, over: 64, budget: 0.01}}}
  exceptions:
    - {name: e, match: {labels: {tenant: red}}, rules: [r, s], until: 2027-03-31}
"""
SETS: Final = """\
apiVersion: moe-guard/v1
kind: ExpertSets
metadata: {name: sets, description: d, labels: {a: b}}
spec:
  profile: m.json
  experts:
    a: [{layer: 0, experts: 0-1}, {set: s}]
    b: [{layers: [0, 1], weights: {1: -0.5}}]
"""
PROFILE: Final = """\
{"apiVersion": "moe-guard/v1", "kind": "Profile",
 "model": {"architecture": "X", "layers": 2, "experts": 4, "topK": 2},
 "provenance": {"data": ["any", 1, null]},
 "sets": {"s": [{"layer": 0, "experts": [3]}, {"layers": "0-1", "experts": ["0", 3]}],
          "w": [{"layer": 1, "weights": {"1": 0.5, "2": -1e-3}}]},
 "baselines": {"tokens": 1000, "rates": {"0": [0.9, 0.8, 0.2, 0.1], "1": [0.5, 0.5, 0.5, 0.5]}},
 "probes": {"q": {"bias": -1.5, "weights": [{"layer": 0, "weights": {"0": 1, "3": 2.5}}]}},
 "thresholds": [{"phase": "output", "when": {"rate": {"experts": "s", "over": 64}},
                 "budgets": [{"budget": 0.01, "above": 0.9}, {"budget": 0.1, "above": 0.5}]}],
 "neverMask": [{"layer": 1, "experts": [0], "reason": "super expert"}]}
"""
FILES: Final = ("p.yaml", "sets.yaml", "m.json")
DOCUMENTS: Final = (POLICY, SETS, PROFILE)

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
ODDITIES: Final = (
    *("&f", "*f", "<<", "!!str", "!!python/object:x", "~", ".nan", "-.inf", "1e999", "0x1F", "9" * 400),
    *(
        "%YAML 1.1",
        "---\n",
        "...\n",
        "\t",
        "'",
        '"',
        "{}",
        "[]",
        "{? [1] : 2}",
        "|\n",
        ">-\n",
        "#",
        ",",
    ),
    *(
        "\x00",
        "\u2028",
        "\ufeff",
        "\ud800",
        '"\\ud800"',
        "NaN",
        "-0",
        "1_000",
        "0-4095",
        "true",
        "null",
    ),
    *("[" * 70, "{a: " * 70, "../x/y", "", " ", "\n", "-1", "0", "0.5", "4096", "65535", "2026-02-30"),
)
TOKENS: Final = tuple(tuple(_TOKEN.findall(document)) for document in DOCUMENTS)
WORDS: Final = tuple(sorted({token for tokens in TOKENS for token in tokens}))
SNIPPETS: Final = st.one_of(
    st.sampled_from(WORDS), st.sampled_from(ODDITIES), st.text(max_size=6), st.integers().map(str)
)


class Edit(NamedTuple):
    """place: share of the way through a document's tokens"""

    document: int
    place: float
    removed: int
    inserted: str
    copied: tuple[float, int]  # place and number of tokens to insert, of any of the documents


EDITS: Final = st.builds(
    Edit,
    st.integers(0, len(DOCUMENTS) - 1),
    st.floats(0, 1),
    st.sampled_from([0, 1, 1, 1, 2, 3, 12]),
    SNIPPETS,
    st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 0, 1, 3, 12, 40])),
)


def edited(edits: list[Edit]) -> tuple[str, ...]:
    """The three documents with the edits made one after the other."""
    documents = [list(tokens) for tokens in TOKENS]
    for edit in edits:
        tokens = documents[edit.document]
        place = int(edit.place * len(tokens))
        source = TOKENS[int(edit.copied[0] * 2.99)]
        start = int(edit.copied[0] * len(source))
        copied = source[start : start + edit.copied[1]]
        tokens[place : place + edit.removed] = [edit.inserted, *copied]
    return tuple("".join(tokens) for tokens in documents)


def texts_of(policy: str, sets: str, profile: str) -> PolicyTexts:
    named = [Text("p.yaml", policy), Text("sets.yaml", sets)]
    return with_profiles(named, lambda path: Text(str(path), profile))


def load(policy: str, sets: str, profile: str) -> PolicySet | None:
    """None where the files were refused. Raises AssertionError for a fault without a place."""
    read = texts_of(policy, sets, profile)
    try:
        return load_texts(read)
    except PolicyError as error:
        check(error.faults, [*read.policies, *read.profiles])
        return None


def check(faults: Sequence[Fault], texts: Sequence[Text]) -> None:
    """Raises AssertionError for a fault that has no place in the texts, or says nothing."""
    lines = {text.file: len(text.text.splitlines()) + 1 for text in texts}
    assert faults
    for fault in faults:
        assert fault.message.strip(), fault
        assert "\n" not in fault.message, fault
        assert 0 <= fault.location.line <= lines[fault.location.file], fault
        assert fault.location.column >= (1 if fault.location.line else 0), fault


def _unedited() -> PolicySet:
    loaded = load(*DOCUMENTS)
    assert loaded is not None, "the documents that are edited are valid"
    return loaded


_UNEDITED: Final = _unedited()


def judge(policies: PolicySet) -> None:
    """What reads a policy set takes each that loads."""
    for finding in lint(policies, with_suite=()):
        assert finding.message
    assert compare(policies, policies) == []
    assert bool(compare(policies, _UNEDITED)) == (policies.revision != _UNEDITED.revision)


def parts(_: Path) -> Parts:
    server = PolicyServer(texts_of(*DOCUMENTS))

    def read(edits: list[Edit]) -> None:
        texts = texts_of(*edited(edits))
        try:
            judge(server.take(lambda: texts))
        except PolicyError as error:
            check(error.faults, [*texts.policies, *texts.profiles])
            raise

    edits = st.lists(EDITS, min_size=1, max_size=3)
    return {"files": Part(edits, read, (PolicyError,), server.state)}
