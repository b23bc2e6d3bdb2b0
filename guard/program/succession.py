"""What of one program goes on in the next: by content, whatever its place in the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from guard.program.program import Ints, Program

NEW = -1


@dataclass(frozen=True, slots=True)
class Succession:
    """For each place in the later program's tables, the place in the earlier one's, or `NEW`.

    signal: [X]
    histogram: [H] of named windows whose distribution conditions read
    rule: [R]; equal in all but mode, and what people read
    condition: [C]; those of rules that go on
    action: [A]; those of rules that go on
    """

    signal: Ints
    histogram: Ints
    rule: Ints
    condition: Ints
    action: Ints

    @staticmethod
    def of(earlier: Program, later: Program) -> Succession:
        rule = _places([r.key for r in earlier.rules], [r.key for r in later.rules])
        condition = np.full(later.conditions.num_conditions, NEW, dtype=np.int64)
        for number, before in enumerate(rule.tolist()):
            if before != NEW:
                columns = later.rule_table.conditions[number]
                of_rule = earlier.rule_table.conditions[before]
                condition[columns[columns >= 0]] = of_rule[of_rule >= 0]
        return Succession(
            signal=_places(earlier.signals.keys, later.signals.keys),
            histogram=_places(earlier.distributions.named_keys, later.distributions.named_keys),
            rule=rule,
            condition=condition,
            action=_places(
                [earlier.rules[r].key for r in earlier.masks.rule],
                [later.rules[r].key for r in later.masks.rule],
            ),
        )


def _places(earlier: Sequence[str], later: Sequence[str]) -> Ints:
    place_of = {key: place for place, key in enumerate(earlier)}
    return np.array([place_of.get(key, NEW) for key in later], dtype=np.int64)
