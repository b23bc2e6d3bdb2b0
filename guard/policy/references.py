"""What one mapping cannot see: names that must exist or be unique, weights that must agree.

These checks read nodes, not the validated schema, so that a file's faults of both sorts come out in
one run; what is malformed they pass over, for the schema has said it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final

from pydantic import ValidationError

from guard.policy.explain import path_text
from guard.policy.fault import Fault, Location
from guard.policy.model import Expert
from guard.policy.nodes import ListNode, MapNode, Node, ScalarNode, find, locate, plain
from guard.policy.schema import EntrySpec, ListedEntrySpec
from guard.policy.suggest import did_you_mean, quote

MAX_EXPERTS: Final = 1 << 20
"""Experts of all sets of a policy, written out; a model of 94 layers of 512 has 48,128."""

_Path = tuple[str | int, ...]
_CONDITIONS: Final = (
    *("count", "rate", "mass", "score"),
    *("coactivation", "dormant", "suppressed"),
)


def reference_faults(root: Node) -> list[Fault]:
    """Faults within one document."""
    return [
        *_name_faults(root, "rules", "the rule"),
        *_name_faults(root, "exceptions", "the exception"),
        *_exception_faults(root),
        *_set_faults(root),
        *_unknown_set_faults(root),
    ]


def foreign_faults(root: Node, find_foreign: Callable[[str, str], object]) -> Iterator[Fault]:
    """Sets of other files that are not there: for their names `find_foreign` raises KeyError."""
    for path, node in _references(root):
        match node:
            case ScalarNode(str(name), location) if "/" in name:
                try:
                    find_foreign(name, location.file)
                except KeyError as error:
                    yield Fault(location, f"{path_text(path)}: {error.args[0]}")
            case _:
                pass


def foreign_names(root: Node) -> list[str]:
    """The sets of other files that rules name, each once."""
    nodes = [node for _, node in _references(root)]
    names = [node.value for node in nodes if isinstance(node, ScalarNode)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and "/" in name))


def duplicate_policy_faults(roots: Iterable[Node]) -> list[Fault]:
    """A fault for each policy whose name an earlier document of the set has."""
    names = ((find(root, ("metadata", "name")), ("metadata", "name")) for root in roots)
    return list(_duplicates(names, "the policy"))


def expert_weights(entry: ListedEntrySpec) -> dict[int, float]:
    """Expert id -> weight of one entry of a set; 1.0 where it gives none."""
    if entry.weights is not None:
        return {expert_id: weight + 0.0 for expert_id, weight in sorted(entry.weights.items())}
    return dict.fromkeys(_united(entry.experts or ()), 1.0)


def entry_layers(entry: ListedEntrySpec) -> tuple[int, ...]:
    """The layers of one entry of a set, ascending, each once."""
    if entry.layer is not None:
        return (entry.layer,)
    return tuple(_united(entry.layers or ()))


def _united(ranges: Iterable[range]) -> Iterator[int]:
    """Their numbers, ascending, each once. Ranges that overlap are not gone through again."""
    following = 0
    for numbers in sorted(ranges, key=lambda one: one.start):
        first = max(numbers.start, following)
        yield from range(first, numbers.stop)
        following = max(following, numbers.stop)


def _name_faults(root: Node, key: str, what: str) -> Iterator[Fault]:
    items = _items(find(root, ("spec", key)))
    paths: list[_Path] = [("spec", key, index, "name") for index in range(len(items))]
    yield from _duplicates(((find(root, path), path) for path in paths), what)


def _exception_faults(root: Node) -> Iterator[Fault]:
    """Exceptions from rules that the policy does not have."""
    rules = _items(find(root, ("spec", "rules")))
    named = [find(rule, ("name",)) for rule in rules]
    names = [node.value for node in named if isinstance(node, ScalarNode)]
    known = [name for name in names if isinstance(name, str)]
    for index in range(len(_items(find(root, ("spec", "exceptions"))))):
        path: _Path = ("spec", "exceptions", index, "rules")
        for number, node in enumerate(_items(find(root, path))):
            match node:
                case ScalarNode(str(name), location) if name not in known:
                    hint = did_you_mean(name, known) or f"; known: {', '.join(known) or 'none'}"
                    text = f"{path_text((*path, number))}: there is no rule {quote(name)}{hint}"
                    yield Fault(location, text)
                case _:
                    pass


def _duplicates(names: Iterable[tuple[Node | None, _Path]], what: str) -> Iterator[Fault]:
    first: dict[str, Location] = {}
    for node, path in names:
        match node:
            case ScalarNode(str(name), location) if name in first:
                message = (
                    f"{path_text(path)}: {what} {quote(name)} is already defined at {first[name]}; "
                    "rename one of them"
                )
                yield Fault(location, message)
            case ScalarNode(str(name), location):
                first[name] = location
            case _:
                pass


def _set_faults(root: Node) -> Iterator[Fault]:
    sets = find(root, ("spec", "experts"))
    budget = MAX_EXPERTS
    for name in sets.entries if isinstance(sets, MapNode) else ():
        if isinstance(name, str) and budget >= 0:
            budget = yield from _one_set_faults(root, ("spec", "experts", name), budget)


def _one_set_faults(root: Node, path: _Path, budget: int) -> Generator[Fault, None, int]:
    """Returns what is left of `budget`, a number of experts; below zero once it is overdrawn."""
    weights: dict[Expert, float] = {}
    for index, node in enumerate(_items(find(root, path))):
        here = (*path, index)
        try:
            entry = EntrySpec.model_validate(plain(node))
        except ValidationError:
            continue
        if entry.set is not None:
            continue  # seen where the profile is
        layers, by_expert = entry_layers(entry), expert_weights(entry)
        budget -= len(layers) * len(by_expert)
        if budget < 0:
            text = f"{path_text(here)}: the policy's sets have more than {MAX_EXPERTS} experts"
            yield Fault(locate(root, here), f"{text}; take some out")
            return budget
        clash = None
        for layer in layers:
            for expert_id, weight in by_expert.items():
                before = weights.setdefault(Expert(layer, expert_id), weight)
                if before != weight and clash is None:
                    clash = (layer, expert_id, weight, before)
        if clash is not None:
            layer, expert_id, weight, before = clash
            at = (*here, "weights", expert_id) if entry.weights else (*here, "experts")
            text = (
                f"{path_text(at)}: expert {expert_id} of layer {layer} has weight {weight:g} here, "
                f"but {before:g} above in the set; give it one weight"
            )
            yield Fault(locate(root, at), text)
    return budget


def _unknown_set_faults(root: Node) -> Iterator[Fault]:
    sets = find(root, ("spec", "experts"))
    if sets is not None and not isinstance(sets, MapNode):
        return
    names = [name for name in sets.entries if isinstance(name, str)] if sets else []
    for path, node in _references(root):
        match node:
            case ScalarNode(str(name), location) if name not in names and "/" not in name:
                known = "known: " + ", ".join(names) if names else "spec.experts has none"
                hint = did_you_mean(name, names) or f"; {known}"
                yield Fault(location, f"{path_text(path)}: there is no set {quote(name)}{hint}")
            case _:
                pass


def _references(root: Node) -> Iterator[tuple[_Path, Node]]:
    """Every place where a rule names a set."""
    for index in range(len(_items(find(root, ("spec", "rules"))))):
        rule = ("spec", "rules", index)
        pending: list[_Path] = [(*rule, "when")]
        paths: list[_Path] = []
        while pending:
            path = pending.pop(0)
            paths += [(*path, word, "experts") for word in _CONDITIONS]
            if find(root, (*path, "not")) is not None:
                pending.append((*path, "not"))
            for word in ("all", "any"):
                children = _items(find(root, (*path, word)))
                pending += [(*path, word, child) for child in range(len(children))]
        for path in (*paths, (*rule, "then", "mask", "experts")):
            node = find(root, path)
            if node is not None:
                yield path, node


def _items(node: Node | None) -> tuple[Node, ...]:
    return node.items if isinstance(node, ListNode) else ()
