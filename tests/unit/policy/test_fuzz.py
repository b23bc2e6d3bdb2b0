"""Whatever is in a file, loading returns policies or raises PolicyError with places in the file."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy import PolicyError, PolicySet, parse_policies
from tools.fuzz import policies as fuzz_policies

DOCUMENT = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: p, severity: high, labels: {a: b}}
spec:
  mode: enforce
  model: {layers: 4, topK: 2}
  experts:
    flagged: &f
      - {layer: 1, experts: [1, 2-3]}
      - {layers: 2-3, weights: {1: 0.5, 2: -1}}
    again: *f
  rules:
    - name: r
      match: {phase: output}
      when:
        any:
          - rate: {experts: flagged, over: 64, minTokens: 3, above: 0.5}
          - not: {score: {experts: again, over: prompt, bias: 1, atMost: 2}}
          - always: {}
      persist: {hits: 2, of: 3}
      then: {mask: {experts: flagged, until: 8}}
    - {name: s, when: always, then: {block: {message: no}}, onError: closed}
"""
TOKENS = re.findall(r"\w+|\s+|[^\w\s]", DOCUMENT)
ODDITIES = [
    *["&f", "*f", "<<", "!!str", "~", ".nan", "1e999", "0x", "9" * 400, "%YAML", "---\n", "\t"],
    *["'", '"', "{}", "[]", "{? [1] : 2}", "\x00", "\u2028", "\ud800", '"\\ud800"'],
]
SNIPPETS = st.sampled_from(sorted(set(TOKENS)) + ODDITIES)
WORDS = st.sampled_from(sorted({token for token in TOKENS if token.isalpha()}))
SCALARS = st.one_of(WORDS, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=20,
)


def load(text: str) -> None:
    try:
        loaded = parse_policies(text, "fuzz.yaml")
    except PolicyError as error:
        lines = len(text.splitlines()) + 1
        for fault in error.faults:
            assert fault.message
            assert fault.location.file == "fuzz.yaml"
            assert 1 <= fault.location.line <= lines
            assert fault.location.column >= 1
    else:
        assert isinstance(loaded, PolicySet)


def flow(value: object) -> str:
    """The value as YAML in flow style."""
    match value:
        case dict():
            return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(flow, value)) + "]"
        case float() if value != value:
            return ".nan"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case _:
            return str(value)


def test_the_document_that_is_mutated_is_valid() -> None:
    assert len(parse_policies(DOCUMENT).policies[0].rules) == 2


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text(text: str) -> None:
    load(text)


@given(st.lists(SNIPPETS, max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_text_of_the_languages_own_words(text: str) -> None:
    load(text)


@given(
    st.lists(
        st.tuples(st.integers(0, len(TOKENS) - 1), st.integers(0, 3), SNIPPETS),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=500, deadline=None)
def test_mutations_of_a_valid_document(edits: list[tuple[int, int, str]]) -> None:
    tokens = list(TOKENS)
    for place, removed, inserted in edits:
        tokens[place : place + removed] = [inserted]
    load("".join(tokens))


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_any_value_where_a_known_one_stood(data: st.DataObject) -> None:
    lines = DOCUMENT.splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    indent, key = re.match(r"( *(?:- )?)(\w+:)?", lines[number]).groups("")  # type: ignore[union-attr]
    lines[number] = f"{indent}{key} {flow(data.draw(VALUES))}"
    load("\n".join(lines))


@given(st.lists(fuzz_policies.EDITS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_edits_of_a_policy_a_set_file_and_a_profile_together(edits: list[fuzz_policies.Edit]) -> None:
    loaded = fuzz_policies.load(*fuzz_policies.edited(edits))
    if loaded is not None:
        fuzz_policies.judge(loaded)


def test_a_policy_is_not_built_where_a_set_of_another_file_has_faults() -> None:
    policy, sets, profile = fuzz_policies.DOCUMENTS

    assert fuzz_policies.load(policy, sets, profile) is not None
    assert fuzz_policies.load(policy, sets.replace("layer: 0", "layer: x"), profile) is None
