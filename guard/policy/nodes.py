"""A YAML document as nodes, each with its place in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from guard.policy.fault import Location

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ScalarNode:
    value: Value
    location: Location


@dataclass(frozen=True, slots=True)
class ListNode:
    items: tuple[Node, ...]
    location: Location


class Entry(NamedTuple):
    key_location: Location
    node: Node


@dataclass(frozen=True, slots=True)
class MapNode:
    entries: dict[Value, Entry]
    location: Location

    def get(self, key: str) -> Node | None:
        entry = self.entries.get(key)
        return entry.node if entry else None


Node = ScalarNode | ListNode | MapNode


def plain(node: Node) -> object:
    """The node as Python values; a list is a tuple."""
    match node:
        case ScalarNode(value):
            return value
        case ListNode(items):
            return tuple(plain(item) for item in items)
        case MapNode(entries):
            return {key: plain(entry.node) for key, entry in entries.items()}


def find(root: Node, path: Sequence[str | int]) -> Node | None:
    """The node at `path`, if there is one."""
    node: Node | None = root
    for step in path:
        match node:
            case MapNode(entries) if step in entries:
                node = entries[step].node
            case ListNode(items) if isinstance(step, int) and step < len(items):
                node = items[step]
            case _:
                return None
    return node


def locate(root: Node, path: Sequence[str | int], *, key: bool = False) -> Location:
    """Where the value at `path` stands, or its key; a path that ends early gives its last node."""
    node, key_location = root, root.location
    for step in path:
        match node:
            case MapNode(entries) if step in entries:
                key_location, node = entries[step]
            case ListNode(items) if isinstance(step, int) and 0 <= step < len(items):
                node = items[step]
                key_location = node.location
            case _:
                return key_location if step == "[key]" else node.location
    return key_location if key else node.location
