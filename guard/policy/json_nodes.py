"""JSON text as nodes, each with its place in the file, so that faults in it have one."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from typing import Final

from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.nodes import Entry, ListNode, MapNode, Node, ScalarNode, Value
from guard.policy.suggest import quote

MAX_DEPTH: Final = 64

_JSON = json.JSONDecoder()

_TOKEN = re.compile(r'[ \t\r\n]*([{}\[\],:]|"(?:[^"\\]|\\.)*"|[^\s,:\[\]{}"]+)')


def read_json(text: str, file: str) -> Node:
    """The one value of a JSON text.

    Raises:
        PolicyError: at the place where it is not JSON, or where a key comes a second time.
    """
    try:
        json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = Location(file, error.lineno, error.colno)
        raise PolicyError([Fault(place, f"not JSON: {error.msg}")]) from error
    except RecursionError as error:
        raise PolicyError([Fault(Location(file), _too_deep())]) from error
    except ValueError as error:
        raise PolicyError([Fault(Location(file), f"not JSON: {error}")]) from error
    return _Reader(text, file).value(0)


def _no_constant(word: str) -> float:
    raise ValueError(f"it has the number {word}, which JSON does not know")


def _too_deep() -> str:
    return f"is nested more than {MAX_DEPTH} deep; make it flatter"


class _Reader:
    """Goes through a text that is known to be JSON."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._end = 0
        self._start = 0

    def _next(self) -> str:
        match = _TOKEN.match(self._text, self._end)
        assert match is not None, "the text was JSON to the json module"
        self._start, self._end = match.start(1), match.end()
        return match[1]

    def _here(self) -> Location:
        line = bisect_right(self._lines, self._start)
        return Location(self._file, line, self._start - self._lines[line - 1] + 1)

    def value(self, depth: int) -> Node:
        token = self._next()
        return self._value(token, depth)

    def _value(self, token: str, depth: int) -> Node:
        place = self._here()
        if depth > MAX_DEPTH:
            raise PolicyError([Fault(place, _too_deep())])
        if token == "{":
            return MapNode(self._entries(depth), place)
        if token == "[":
            return ListNode(self._items(depth), place)
        scalar: Value
        scalar, _ = _JSON.raw_decode(token)
        return ScalarNode(scalar, place)

    def _items(self, depth: int) -> tuple[Node, ...]:
        items: list[Node] = []
        token = self._next()
        while token != "]":
            items.append(self._value(self._next() if token == "," else token, depth + 1))
            token = self._next()
        return tuple(items)

    def _entries(self, depth: int) -> dict[Value, Entry]:
        entries: dict[Value, Entry] = {}
        token = self._next()
        while token != "}":
            if token == ",":
                token = self._next()
            (key, _), place = _JSON.raw_decode(token), self._here()
            if key in entries:
                first = entries[key].key_location
                text = f"the key {quote(key)} is already given at line {first.line}; keep one of them"
                raise PolicyError([Fault(place, text)])
            self._next()  # the colon
            entries[key] = Entry(place, self.value(depth + 1))
            token = self._next()
        return entries
