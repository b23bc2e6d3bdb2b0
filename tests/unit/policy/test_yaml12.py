"""YAML: what scalars mean, where nodes stand, and what is refused before policies are read."""

from __future__ import annotations

import math

import pytest

from guard.policy.nodes import ListNode, MapNode, ScalarNode, locate, plain
from guard.policy.yaml12 import MAX_DEPTH, MAX_VALUES, read_documents


def value_of(text: str) -> object:
    roots, faults = read_documents(f"- {text}", "y")
    assert not faults
    (root,) = roots
    assert isinstance(root, ListNode)
    return plain(root.items[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ["off", "on", "yes", "no", "Off", "y", "2027-03-31", "1_000"]],
        *[(word, word) for word in ["90-95", "0b1", "1:30", "1e", "+-1", "."]],
        *[(word, True) for word in ["true", "True", "TRUE"]],
        *[(word, False) for word in ["false", "False", "FALSE"]],
        *[(word, None) for word in ["", "~", "null", "Null", "NULL"]],
        ("012", 12),
        ("-3", -3),
        ("+3", 3),
        ("0o17", 15),
        ("0xfF", 255),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("1e3", 1000.0),
        (".Inf", math.inf),
        ("-.INF", -math.inf),
        ("'true'", "true"),
        ('"12"', "12"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = value_of(text)

    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    found = value_of(".NaN")

    assert isinstance(found, float)
    assert math.isnan(found)


def test_every_node_knows_its_line_and_column() -> None:
    (root,), faults = read_documents("a:\n  - x\n  - {b: [1, 2]}\n", "y")

    assert not faults
    assert locate(root, ("a",))[1:] == (2, 3)
    assert locate(root, ("a",), key=True)[1:] == (1, 1)
    assert locate(root, ("a", 1, "b", 1))[1:] == (3, 13)
    assert locate(root, ("a", 1, "b"), key=True)[1:] == (3, 6)
    assert locate(root, ("a", 7))[1:] == (2, 3)


def test_value_that_is_left_out_stands_where_its_key_does() -> None:
    (root,), _ = read_documents("x: 1\na:\n", "y")

    assert locate(root, ("a",))[1:] == (2, 1)


def test_alias_is_its_anchors_node_and_anchors_end_with_their_document() -> None:
    roots, faults = read_documents("a: &x [1]\nb: *x\n---\nc: *x\n", "y")

    assert [plain(root) for root in roots] == [{"a": (1,), "b": (1,)}]
    assert [(fault.location[1:], fault.message) for fault in faults] == [
        ((4, 4), "the alias *x has no anchor &x before it")
    ]


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, 2, "broken YAML"),
        ("a: b: c\n", 1, 5, "broken YAML: mapping values are not allowed here"),
        ("a:\n\t- b\n", 2, 1, "indent with spaces"),
        ("a: 'x\n", 2, 1, "broken YAML"),
        ("a: 1\na: 2\n", 2, 1, "the key 'a' is already given on line 1"),
        ("{1: a, 1.0: b}", 1, 8, "already given"),
        ("a: !!str 1\n", 1, 4, "the tag 'tag:yaml.org,2002:str' is not allowed"),
        ("!x {}\n", 1, 1, "the tag '!x' is not allowed"),
        ("a: &x {<<: {}}\n", 1, 8, "no merge key"),
        ("a: &x [*x]\n", 1, 8, "stands inside its own anchor"),
        ("? [1]\n: 2\n", 1, 3, "a key must be a word"),
        ("~: 2", 1, 1, "a key is missing"),
        ("a: \x07\n", 1, 4, "'\\x07' is not allowed"),
        ('a: "\\UFFFFFFFF"\n', 1, 7, "out of range"),
        ('a: "\\ud800"\n', 1, 4, "half of a surrogate pair"),
        ("a: " + "9" * 50, 1, 4, "a number of 50 digits is too long"),
        ("%YAML 2.0\n---\na: 1\n", 1, 1, "broken YAML"),
    ],
)
def test_what_is_refused(text: str, line: int, column: int, message: str) -> None:
    _, (fault, *_) = read_documents(text, "y")

    assert message in fault.message
    assert fault.location == ("y", line, column)


def test_documents_before_a_broken_one_are_kept() -> None:
    roots, faults = read_documents("a: 1\n---\n[", "y")

    assert [plain(root) for root in roots] == [{"a": 1}]
    assert len(faults) == 1


def test_documents_that_hold_nothing_are_left_out() -> None:
    roots, faults = read_documents("# only\n---\n---\na: 1\n---\n", "y")

    assert [plain(root) for root in roots] == [{"a": 1}]
    assert not faults


def test_nesting_is_bounded() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH

    assert not read_documents(deepest, "y").faults
    (fault,) = read_documents(f"[{deepest}]", "y").faults
    assert "nested deeper than" in fault.message
    (fault,) = read_documents("[" * 100_000, "y").faults
    assert "nested deeper than" in fault.message


def test_nesting_is_bounded_through_aliases() -> None:
    half = MAX_DEPTH // 2 + 1
    text = f"[&a {'[' * half}{']' * half}, {'[' * half} *a {']' * half}]"

    (fault,) = read_documents(text, "y").faults

    assert "nested deeper than" in fault.message


def test_aliases_written_out_are_bounded() -> None:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]

    (fault,) = read_documents("\n".join(laughs), "y").faults

    assert f"more than {MAX_VALUES} values" in fault.message


def test_mapping_keeps_the_first_of_two_equal_keys() -> None:
    (root,), _ = read_documents("a: 1\na: 2\n", "y")

    assert isinstance(root, MapNode)
    first = root.get("a")
    assert isinstance(first, ScalarNode)
    assert first.value == 1
