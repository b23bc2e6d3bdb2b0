"""Reads vLLM's source, imports none of it, and says of each seam whether it holds there.

Attributes are searched in a class and its bases, through the imports of the modules that they come
from: methods, fields, and what methods assign to `self`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from guard_vllm.compat import Seam

ReadText = Callable[[str], str | None]
"""Text of a file by its path in the distribution (`vllm/config/vllm.py`), None where there is none."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class State(StrEnum):
    OK = "ok"
    ABSENT = "absent"  # and the seam says that the plugin does without
    MISSING = "missing"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Finding:
    state: State
    what: str = ""

    @property
    def holds(self) -> bool:
        return self.state in (State.OK, State.ABSENT)


class Source:
    """One version of vLLM, parsed as far as it is asked about."""

    def __init__(self, read_text: ReadText) -> None:
        self._read_text = read_text
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if (text := self._read_text(candidate)) is not None:
                return Module(self, name, ast.parse(text), candidate.endswith("__init__.py"))
        return None

    def check(self, seam: Seam, version: str) -> Finding:
        """Whether the seam holds in this source, which is of that version (only major.minor counts)."""
        module = self.module(seam.module)
        node = None if module is None else module.find(seam.name) if seam.name else module
        if node is None:
            expected = seam.since and _number(version) < _number(seam.since)
            if seam.optional or expected:
                return Finding(State.ABSENT)
            what = "the module" if module is None else ""
            return Finding(State.MISSING, what)
        changes = list(_changes(seam, node))
        return Finding(State.CHANGED, "; ".join(changes)) if changes else Finding(State.OK)


@dataclass(frozen=True, slots=True)
class Found:
    """A class, function or other name at module level or in a class, where it is defined."""

    module: Module
    node: ast.AST

    def attributes(self) -> set[str]:
        """Names that a class, its bases and its instances have."""
        if not isinstance(self.node, ast.ClassDef):
            return set()
        names: set[str] = set()
        for owner in self.module.with_bases(self.node):
            names |= set(owner.members()) | set(_assigned_to_self(owner.node))
        return names

    def members(self) -> dict[str, ast.AST]:
        assert isinstance(self.node, ast.ClassDef)
        return dict(_bindings(self.node.body))


class Module:
    def __init__(self, source: Source, name: str, tree: ast.Module, is_package: bool) -> None:
        self._source = source
        self._name = name
        self._tree = tree
        self._is_package = is_package

    @cached_property
    def _names(self) -> dict[str, ast.AST]:
        return dict(_bindings(self._tree.body))

    def attributes(self) -> set[str]:
        return set(self._names)

    def find(self, qualified_name: str) -> Found | None:
        """Follows imports to where the name is defined, and a class's bases for what it inherits."""
        first, _, rest = qualified_name.partition(".")
        found = self._find_here(first)
        if found is None or not rest:
            return found
        if not isinstance(found.node, ast.ClassDef):
            return None
        for owner in found.module.with_bases(found.node):
            if (node := owner.members().get(rest)) is not None:
                return Found(owner.module, node)
            if rest in set(_assigned_to_self(owner.node)):
                return Found(owner.module, owner.node)
        return None

    def _find_here(self, name: str) -> Found | None:
        node = self._names.get(name)
        if not isinstance(node, ast.ImportFrom):
            return None if node is None else Found(self, node)
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        origin = self._absolute(node)
        if origin.partition(".")[0] != "vllm":
            return Found(self, node)
        module = self._source.module(origin)
        return None if module is None else module._find_here(alias.name)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self._name.split(".")
        kept = parts[: len(parts) - node.level + (1 if self._is_package else 0)]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def with_bases(self, node: ast.ClassDef) -> Iterator[Found]:
        """The class and the bases that vLLM defines, nearest first."""
        yield Found(self, node)
        for base in node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            found = self._find_here(target.id) if isinstance(target, ast.Name) else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from found.module.with_bases(found.node)


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements bind, those in if, try and with included; of overloads the last."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (
                    (name.id, node)
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                )
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, block, ()):
                    yield from _bindings(part.body if isinstance(part, ast.ExceptHandler) else [part])


def _assigned_to_self(node: ast.AST) -> Iterator[str]:
    """Names that methods of a class assign to `self`."""
    for child in ast.walk(node):
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Store)
            and isinstance(child.value, ast.Name)
            and child.value.id == "self"
        ):
            yield child.attr


def _changes(seam: Seam, found: Found | Module) -> Iterator[str]:
    absent = [name for name in seam.has if name not in found.attributes()]
    if absent:
        yield f"has no {', '.join(absent)}"
    if not (seam.leading or seam.takes or seam.exact is not None or seam.returns):
        return
    node = found.node if isinstance(found, Found) else None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield "is no function"
        return
    parameters = _parameters(node)
    if tuple(parameters[: len(seam.leading)]) != seam.leading:
        yield f"begins with ({', '.join(parameters[: len(seam.leading)])})"
    unknown = [name for name in seam.takes if name not in parameters]
    if unknown:
        yield f"has no parameter {', '.join(unknown)}"
    if seam.exact is not None and tuple(parameters) != seam.exact:
        yield f"takes ({', '.join(parameters)})"
    if seam.returns and (lengths := _returned(node)) != {seam.returns}:
        given = " or ".join(map(str, sorted(lengths))) or "an unknown number of"
        yield f"returns {given} values"


def _parameters(node: Function) -> list[str]:
    arguments = node.args
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _returned(node: Function) -> set[int]:
    """Lengths of the tuples that a function says, or else is seen, to return."""
    annotation = node.returns
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if (
        isinstance(annotation, ast.Subscript)
        and isinstance(annotation.value, ast.Name)
        and annotation.value.id in ("tuple", "Tuple")
        and isinstance(annotation.slice, ast.Tuple)
    ):
        return {len(annotation.slice.elts)}
    returned = (child.value for child in ast.walk(node) if isinstance(child, ast.Return))
    return {len(value.elts) for value in returned if isinstance(value, ast.Tuple)}


def _number(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
