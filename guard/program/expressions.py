"""Lowers the nested all / any / not of every rule to a few levels of one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from guard.policy.model import All, AnyOf, Condition, Expression, Not
from guard.program.program import ExpressionTable, Level

TRUE_COLUMN = 0


class _Ref(NamedTuple):
    """A node that may still move: (level, number in it), level 0 being conditions by their number."""

    level: int
    number: int
    negated: bool

    def flipped(self) -> _Ref:
        return self._replace(negated=not self.negated)


class ExpressionBuilder:
    """Adds one rule's expression after the other; `table` lays the nodes out level by level."""

    def __init__(self, num_of_condition: Callable[[Condition], int]) -> None:
        self._num_of_condition = num_of_condition
        self._num_conditions = 0
        self._levels: list[dict[tuple[_Ref, ...], int]] = []
        self._roots: list[_Ref] = []

    def add_rule(self, expression: Expression) -> None:
        self._roots.append(self._lower(expression))

    def _lower(self, node: Expression) -> _Ref:
        match node:
            case Condition():
                number = self._num_of_condition(node)
                self._num_conditions = max(self._num_conditions, number + 1)
                return _Ref(0, number, negated=False)
            case Not(child):
                return self._lower(child).flipped()
            case All(children):
                return self._least([self._lower(child) for child in children])
            case AnyOf(children):
                return self._least([self._lower(child).flipped() for child in children]).flipped()

    def _least(self, children: list[_Ref]) -> _Ref:
        if len(children) == 1:
            return children[0]
        level = 1 + max(child.level for child in children)
        while len(self._levels) < level:
            self._levels.append({})
        nodes = self._levels[level - 1]
        return _Ref(level, nodes.setdefault(tuple(children), len(nodes)), negated=False)

    def table(self, num_conditions: int) -> ExpressionTable:
        assert num_conditions >= self._num_conditions
        first_column = [1, 1 + num_conditions]
        for nodes in self._levels:
            first_column.append(first_column[-1] + len(nodes))

        def column(ref: _Ref) -> int:
            return first_column[ref.level] + ref.number

        levels = []
        for nodes in self._levels:
            width = max(map(len, nodes), default=1)
            children = np.full((len(nodes), width), TRUE_COLUMN, dtype=np.int64)
            negated = np.zeros((len(nodes), width), dtype=np.bool_)
            for refs, number in nodes.items():
                children[number, : len(refs)] = [column(ref) for ref in refs]
                negated[number, : len(refs)] = [ref.negated for ref in refs]
            levels.append(Level(children, negated))
        return ExpressionTable(
            levels=tuple(levels),
            root=np.array([column(ref) for ref in self._roots], dtype=np.int64),
            root_negated=np.array([ref.negated for ref in self._roots], dtype=np.bool_),
        )
