"""Pydantic's errors -> faults in our words, at their places in the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError

from guard.policy.fault import Fault
from guard.policy.nodes import Node, locate
from guard.policy.scalars import (
    FINGERPRINT_PATTERN,
    LABEL_PATTERN,
    NAME_PATTERN,
    SET_NAME_PATTERN,
)
from guard.policy.spec import KEY_FAULT, VALUE_FAULT
from guard.policy.suggest import describe

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,63}")

_PATTERNS: Final = {
    NAME_PATTERN: "a name of a-z, 0-9 and '-', with '-' only inside",
    SET_NAME_PATTERN: "a name of letters, digits, '-', '_' and '.'",
    LABEL_PATTERN: "a name of letters, digits, '-', '_' and '.', with letters or digits at its ends",
    FINGERPRINT_PATTERN: "sha256: and 64 digits of 0-9 and a-f",
}

_EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} character(s)",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} items",
}


def explain(error: ValidationError, root: Node) -> list[Fault]:
    """The faults of a document that did not validate.

    A document of another kind has only its header's faults: the rest is not ours to judge.
    """
    details = error.errors(include_url=False)
    if is_other_kind(error):
        details = [detail for detail in details if detail["loc"] in (("kind",), ("apiVersion",))]
    # Pydantic counts the valid items only: a list of one bad item is also too short to it.
    return [
        _fault(dict(detail), root)
        for detail in details
        if not (detail["type"] == "too_short" and detail["input"])
    ]


def is_other_kind(error: ValidationError) -> bool:
    """The document says of itself that it is no policy."""
    return any(detail["loc"] == ("kind",) and detail["type"] != "missing" for detail in error.errors())


def path_text(path: Sequence[str | int]) -> str:
    """`spec.rules[0].when`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            text += f".{step}"
        else:
            text += f"[{step[:40]!r}]"
    return text.removeprefix(".")


def _fault(detail: dict[str, Any], root: Node) -> Fault:
    path: tuple[str | int, ...] = detail["loc"]
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "missing":
        parent = path[:-1]
        message = f"the key {path[-1]!r} is missing"
        return Fault(locate(root, parent), _with_path(parent, message))
    of_key = path[-1:] == ("[key]",)
    shown = path[:-1] if of_key else path
    if kind in (KEY_FAULT, VALUE_FAULT):
        message = context["text"]
    else:
        found = describe(detail["input"])
        if kind in ("float_type", "int_type") and _is_number(detail["input"]):
            found += "; take the quotes off"
        if kind in ("float_type", "int_type") and (share := _per_cent(detail["input"])):
            found += f"; write {share}"
        if kind == "tuple_type":
            found += _as_list(detail["input"])
        if kind == "string_type":
            found += "; put it in quotes if it is meant as text"
        what = "a key that is " if of_key else ""
        message = f"expected {what}{_expected(kind, context)}, found {found}"
    place = locate(root, path, key=kind == KEY_FAULT or of_key)
    return Fault(place, _with_path(shown, message))


def _expected(kind: str, context: dict[str, Any]) -> str:
    if kind == "string_pattern_mismatch":
        return _PATTERNS[context["pattern"]]
    bounds = {
        key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()
    }
    return _EXPECTED.get(kind, "another value").format(**bounds)


def _is_number(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+", value) is not None


def _per_cent(value: object) -> str:
    """`0.12` for `12%`."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%", value) if isinstance(value, str) else None
    return f"{float(match[1]) / 100:g}" if match else ""


def _as_list(value: object) -> str:
    if isinstance(value, dict) and value:
        return "; begin each item with '- '"
    short = isinstance(value, str) and _PLAIN_KEY.fullmatch(value) is not None
    return f"; write [{value}]" if short else ""


def _with_path(path: Sequence[str | int], message: str) -> str:
    return f"{path_text(path)}: {message}" if path else message
