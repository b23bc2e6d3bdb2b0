"""Defaults, sets, order and revision: what a policy means where it says little."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from guard.policy import PolicyError, parse_policies
from guard.policy.model import (
    Action,
    All,
    AnyOf,
    Block,
    Condition,
    ConditionKind,
    Expert,
    Expression,
    Mask,
    MaskMethod,
    Mode,
    NamedWindow,
    Not,
    Observe,
    OnError,
    Phase,
    Policy,
    Rule,
    Severity,
)

HEAD = "apiVersion: moe-guard/v1\nkind: Policy\n"


def policy(spec: str, metadata: str = "name: p") -> Policy:
    return parse_policies(f"{HEAD}metadata: {{{metadata}}}\nspec:\n{spec}").policies[0]


def rule(when: str, rest: str = "") -> Rule:
    spec = (
        "  experts: {f: [{layer: 0, experts: [1, 2]}]}\n"
        f"  rules:\n    - name: r\n      when: {when}\n{rest}"
    )
    return policy(spec).rules[0]


def condition(when: str) -> Condition:
    expression = rule(when).when
    assert isinstance(expression, Condition)
    return expression


def weights(entries: str) -> Mapping[Expert, float]:
    return policy(f"  experts: {{f: {entries}}}\n  rules: []").experts["f"].weights


def test_defaults_of_a_policy_that_says_only_what_it_must() -> None:
    loaded = policy("  rules:\n    - {name: r, when: {always: {}}}")

    assert (loaded.mode, loaded.severity) == (Mode.AUDIT, Severity.MEDIUM)
    assert loaded.model is None
    only = loaded.rules[0]
    assert (only.phase, only.then, only.on_error) == (Phase.ANY, Observe(), OnError.OPEN)
    assert (only.persist.hits, only.persist.of) == (1, 1)


@pytest.mark.parametrize("word", ["off", "audit", "enforce"])
def test_mode_is_the_word_even_where_older_yaml_reads_a_boolean(word: str) -> None:
    assert policy(f"  mode: {word}\n  rules: []").mode == word


def test_rule_takes_on_error_from_its_policy_unless_it_has_its_own() -> None:
    rules = policy(
        "  onError: closed\n  rules:\n"
        "    - {name: a, when: {always: true}}\n"
        "    - {name: b, when: {always: true}, onError: open}"
    ).rules

    assert [r.on_error for r in rules] == [OnError.CLOSED, OnError.OPEN]


@pytest.mark.parametrize("when", ["{always: {}}", "{always: true}", "{always: }", "always"])
def test_always_may_be_written_with_or_without_empty_settings(when: str) -> None:
    assert rule(when).is_static


@pytest.mark.parametrize(
    ("then", "action"),
    [
        ("observe", Observe()),
        ("{observe: {}}", Observe()),
        ("block", Block()),
        ("{block: {}}", Block()),
        ("{block: {message: no}}", Block("no")),
    ],
)
def test_actions(then: str, action: Action) -> None:
    assert rule("always", f"      then: {then}").then == action


@pytest.mark.parametrize("until", ["request-end", "clear", 8])
def test_mask_until(until: str | int) -> None:
    then = rule("always", f"      then: {{mask: {{experts: f, until: {until}}}}}").then

    assert isinstance(then, Mask)
    assert (then.until, then.method, then.experts.name) == (until, "reroute", "f")


@pytest.mark.parametrize("method", list(MaskMethod))
def test_mask_method(method: MaskMethod) -> None:
    then = rule("always", f"      then: {{mask: {{experts: f, method: {method}}}}}").then

    assert isinstance(then, Mask)
    assert then.method is method


@pytest.mark.parametrize(
    ("kind", "settings", "over", "min_tokens"),
    [
        ("count", "over: 64, above: 1", 64, 1),
        ("count", "over: 64, atLeast: 1", 64, 1),
        ("count", "over: 64, below: 1", 64, 64),
        ("count", "over: 64, atMost: 1", 64, 64),
        ("rate", "over: 64, above: 1", 64, 64),
        ("mass", "over: 64, atLeast: 1", 64, 64),
        ("score", "over: 64, above: 1", 64, 64),
        ("rate", "over: 64, minTokens: 5, above: 1", 64, 5),
        ("rate", "over: token, above: 1", NamedWindow.TOKEN, 1),
        ("rate", "over: prompt, above: 1", NamedWindow.PROMPT, 1),
        ("mass", "over: output, below: 1", NamedWindow.OUTPUT, 1),
        ("mass", "over: request, minTokens: 9000, below: 1", NamedWindow.REQUEST, 9000),
        ("count", "atMost: 1", NamedWindow.REQUEST, 1),
    ],
)
def test_window_and_its_floor(kind: str, settings: str, over: object, min_tokens: int) -> None:
    loaded = condition(f"{{{kind}: {{experts: f, {settings}}}}}")

    assert (loaded.kind, loaded.over, loaded.min_tokens) == (kind, over, min_tokens)


def test_score_has_a_bias() -> None:
    assert condition("{score: {experts: f, bias: -1.5, above: 0}}").bias == -1.5
    assert condition("{score: {experts: f, above: 0}}").bias == 0.0


def test_repeated_conditions_are_numbered_in_the_order_in_which_they_are_written() -> None:
    one = "{experts: f, above: 0}"
    when = rule(
        f"{{any: [{{rate: {one}}}, {{all: [{{rate: {one}}}, {{mass: {one}}}]}},"
        f" {{not: {{rate: {one}}}}}]}}"
    )

    assert [c.label for c in when.conditions()] == ["rate", "rate#2", "mass", "rate#3"]


def test_an_alias_makes_a_condition_of_its_own_at_each_place() -> None:
    when = rule("{any: [{all: [&c {rate: {experts: f, above: 0}}]}, *c]}").when

    assert isinstance(when, AnyOf)
    inner, second = when.children
    assert isinstance(inner, All)
    first = inner.children[0]
    assert isinstance(first, Condition)
    assert isinstance(second, Condition)
    assert (first.label, second.label) == ("rate", "rate#2")


def test_nested_expressions_keep_their_shape() -> None:
    def shape(expression: Expression) -> object:
        match expression:
            case Condition(kind=kind):
                return kind
            case All(children):
                return ("all", *map(shape, children))
            case AnyOf(children):
                return ("any", *map(shape, children))
            case Not(child):
                return ("not", shape(child))

    loaded = rule("{not: {any: [always, {all: [{not: always}]}]}}").when

    always = ConditionKind.ALWAYS
    assert shape(loaded) == ("not", ("any", always, ("all", ("not", always))))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("[{layer: 3, experts: [5, 7-9]}]", {(3, 5): 1, (3, 7): 1, (3, 8): 1, (3, 9): 1}),
        ("[{layer: 3, experts: 5}]", {(3, 5): 1}),
        ("[{layer: 3, experts: 4-5}]", {(3, 4): 1, (3, 5): 1}),
        ("[{layers: 2-3, experts: [0]}]", {(2, 0): 1, (3, 0): 1}),
        ("[{layers: [2, 4-5], experts: [0]}]", {(2, 0): 1, (4, 0): 1, (5, 0): 1}),
        ("[{layers: [2], weights: {7: -0.5, 8: 2}}]", {(2, 7): -0.5, (2, 8): 2}),
        ("[{layer: 1, experts: [1, 1-2]}, {layer: 1, experts: [2]}]", {(1, 1): 1, (1, 2): 1}),
        ("[{layer: 1, experts: [1]}, {layer: 1, weights: {1: 1.0}}]", {(1, 1): 1}),
    ],
)
def test_sets_unite_their_entries(entries: str, expected: dict[tuple[int, int], float]) -> None:
    assert weights(entries) == expected


def test_policies_are_ordered_by_severity_then_name_and_rules_as_written() -> None:
    text = "---\n".join(
        f"{HEAD}metadata: {{name: {name}, severity: {severity}}}\n"
        "spec: {rules: [{name: z, when: always}, {name: a, when: always}]}\n"
        for name, severity in [("b", "low"), ("c", "critical"), ("a", "low"), ("d", "info")]
    )

    loaded = parse_policies(text)

    assert [p.name for p in loaded.policies] == ["c", "a", "b", "d"]
    assert [r.name for r in loaded.policies[0].rules] == ["z", "a"]


BASE = (
    f"{HEAD}metadata: {{name: p}}\n"
    "spec:\n  experts: {f: [{layer: 1, experts: [1-3]}]}\n"
    "  rules: [{name: r, when: {rate: {experts: f, over: 8, above: 0.5}}}]\n"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("apiVersion", "# a comment\n\napiVersion"),
        ("[1-3]", "[3, 2, 1, 1]"),
        ("over: 8,", "over: 8, minTokens: 8,"),
        ("when: {rate", "then: observe, when: {rate"),
        ("0.5", "5.0e-1"),
    ],
)
def test_revision_does_not_change_with_writing(old: str, new: str) -> None:
    assert old in BASE

    again = parse_policies(BASE.replace(old, new, 1), "elsewhere.yaml")

    assert again.revision == parse_policies(BASE).revision


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[1-3]", "[1-4]"),
        ("over: 8,", "over: 9,"),
        ("0.5", "0.25"),
        ("above", "atLeast"),
        ("spec:", "spec:\n  mode: enforce"),
        ("{name: p}", "{name: q}"),
        ("{name: r,", "{name: r, then: block,"),
        ("{name: r,", "{name: r, match: {phase: prompt},"),
    ],
)
def test_revision_changes_with_content(old: str, new: str) -> None:
    assert old in BASE

    assert parse_policies(BASE.replace(old, new, 1)).revision != parse_policies(BASE).revision


def test_error_lists_every_fault_in_reading_order() -> None:
    text = BASE.replace("name: p", "name: P").replace("0.5", "x")
    with pytest.raises(PolicyError) as caught:
        parse_policies(text + "---\nkind: Polcy\n", "a.yaml")

    assert [fault.location.line for fault in caught.value.faults] == [3, 6, 8, 8]
