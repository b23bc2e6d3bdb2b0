"""YAML 1.2 text -> nodes that know their places. Strict where a slip would pass unseen.

PyYAML scans and parses; composing and the meaning of scalars are ours, by the core schema of YAML
1.2 (`off` and `2027-03-31` are text). Refused: tags, merge keys, a key twice in a mapping, keys
that are no scalars. Aliases are followed, within limits on depth and on the values written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol, cast

import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from guard.policy.fault import Fault, Location
from guard.policy.nodes import Entry, ListNode, MapNode, Node, ScalarNode, Value
from guard.policy.suggest import did_you_mean, quote

MAX_FILE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000
"""Scalars, lists and mappings of one file, every alias counted as if written out."""
_MAX_DIGITS: Final = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Documents(NamedTuple):
    """What a text holds as far as it could be read, and all that is wrong with it as YAML."""

    roots: tuple[Node, ...]  # documents that hold nothing are left out
    faults: tuple[Fault, ...]


def read_documents(text: str, file: str) -> Documents:
    """Compose every document of `text`; `file` is the name that locations carry. Never raises."""
    return _Composer(text, file).documents()


class _Composed(NamedTuple):
    node: Node
    values: int  # written out
    height: int


class _Mark(Protocol):
    line: int
    column: int


class _UnreadableError(Exception):
    """The rest of the text cannot be read."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(location, message)


class _Composer:
    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._faults: list[Fault] = []
        self._values = 0
        self._anchors: dict[str, _Composed | None] = {}  # None: its node is still open

    def documents(self) -> Documents:
        roots: list[Node] = []
        try:
            events = self._events()
            for event in events:
                if isinstance(event, DocumentStartEvent):
                    self._anchors = {}
                elif not isinstance(event, StreamStartEvent | StreamEndEvent | DocumentEndEvent):
                    root = self._compose(event, events, depth=1).node
                    if not (isinstance(root, ScalarNode) and root.value is None):
                        roots.append(root)
        except _UnreadableError as error:
            self._faults.append(error.fault)
        return Documents(tuple(roots), tuple(self._faults))

    def _events(self) -> Iterator[Event]:
        try:
            loader = yaml.SafeLoader(self._text)
        except yaml.reader.ReaderError as error:
            before = self._text[: error.position]
            column = len(before) - (before.rfind("\n") + 1) + 1
            place = Location(self._file, before.count("\n") + 1, column)
            character = self._text[error.position]
            message = f"the character {character!r} is not allowed in YAML; take it out"
            raise _UnreadableError(place, message) from error
        next_event = cast("Callable[[], Event]", loader.get_event)
        while True:
            try:
                event = next_event()
            except yaml.MarkedYAMLError as error:
                mark = error.problem_mark or error.context_mark
                why = ", ".join(part for part in (error.context, error.problem) if part)
                hint = "; indent with spaces" if "'\\t'" in why else ""
                raise _UnreadableError(self._place(mark), f"broken YAML: {why}{hint}") from error
            except (ValueError, OverflowError) as error:  # PyYAML: "\UFFFFFFFF", %YAML 1.<huge>
                mark = loader.get_mark()
                message = f"broken YAML: a number here is out of range ({error})"
                raise _UnreadableError(self._place(mark), message) from error
            yield event
            if isinstance(event, StreamEndEvent):
                return

    def _compose(self, event: Event, events: Iterator[Event], depth: int) -> _Composed:
        place = self._place(event.start_mark)
        if isinstance(event, AliasEvent):
            return self._alias(str(event.anchor), place, depth)
        self._count(1, place)
        self._check_depth(depth, place)
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._fault(place, f"the tag {quote(tag)} is not allowed; policies are plain YAML")
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = None
        match event:
            case ScalarEvent():
                composed = _Composed(ScalarNode(self._scalar(event, place), place), 1, 1)
            case SequenceStartEvent():
                composed = self._list(place, events, depth)
            case MappingStartEvent():
                composed = self._map(place, events, depth)
            case _:
                raise AssertionError(f"no node starts with {event}")
        if anchor is not None:
            self._anchors[anchor] = composed
        return composed

    def _list(self, place: Location, events: Iterator[Event], depth: int) -> _Composed:
        children: list[_Composed] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            children.append(self._compose(event, events, depth + 1))
        return self._sized(ListNode(tuple(child.node for child in children), place), children)

    def _map(self, place: Location, events: Iterator[Event], depth: int) -> _Composed:
        entries: dict[Value, Entry] = {}
        children: list[_Composed] = []
        while not isinstance(event := next(events), MappingEndEvent):
            key_place = self._place(event.start_mark)
            key = self._compose(event, events, depth + 1)
            value = self._compose(next(events), events, depth + 1)
            children += (key, value)
            node = value.node
            if isinstance(node, ScalarNode) and node.value is None:
                node = ScalarNode(None, key_place)
            match key.node:
                case ScalarNode(None):
                    self._fault(key_place, "a key is missing before ':'")
                case ScalarNode("<<"):
                    self._fault(key_place, "YAML 1.2 has no merge key '<<'; write the keys out")
                case ScalarNode(name) if name in entries:
                    line = entries[name].key_location.line
                    text = quote(str(name))
                    self._fault(
                        key_place,
                        f"the key {text} is already given on line {line}; keep one of the two",
                    )
                case ScalarNode(name):
                    entries[name] = Entry(key_place, node)
                case _:
                    self._fault(key_place, "a key must be a word, not a list or a mapping")
        return self._sized(MapNode(entries, place), children)

    def _alias(self, anchor: str, place: Location, depth: int) -> _Composed:
        if anchor not in self._anchors:
            hint = did_you_mean(anchor, self._anchors)
            raise _UnreadableError(
                place, f"the alias *{anchor[:60]} has no anchor &{anchor[:60]} before it{hint}"
            )
        target = self._anchors[anchor]
        if target is None:
            raise _UnreadableError(place, f"the alias *{anchor[:60]} stands inside its own anchor")
        self._count(target.values, place)
        self._check_depth(depth + target.height - 1, place)
        return target

    def _scalar(self, event: ScalarEvent, place: Location) -> Value:
        text: str = event.value
        try:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._fault(place, "half of a surrogate pair is no character; write the other half")
            return ""
        if event.style is not None:
            return text
        if _INT.fullmatch(text) or _BASED_INT.fullmatch(text):
            if len(text) > _MAX_DIGITS:
                self._fault(place, f"a number of {len(text)} digits is too long")
                return 0
            return int(text, 0 if _BASED_INT.fullmatch(text) else 10)
        if _FLOAT.fullmatch(text):
            return float(text)
        if _SPECIAL_FLOAT.fullmatch(text):
            return float(text.replace(".", ""))
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        return None if _NULL.fullmatch(text) else text

    def _sized(self, node: Node, children: list[_Composed]) -> _Composed:
        values = 1 + sum(child.values for child in children)
        return _Composed(node, values, 1 + max((child.height for child in children), default=0))

    def _count(self, values: int, place: Location) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _UnreadableError(
                place, f"more than {MAX_VALUES} values with aliases written out; split the file"
            )

    def _check_depth(self, depth: int, place: Location) -> None:
        if depth > MAX_DEPTH:
            raise _UnreadableError(place, f"nested deeper than {MAX_DEPTH} levels; flatten it")

    def _fault(self, place: Location, message: str) -> None:
        self._faults.append(Fault(place, message))

    def _place(self, mark: _Mark | None) -> Location:
        return Location(self._file, mark.line + 1, mark.column + 1) if mark else Location(self._file)
