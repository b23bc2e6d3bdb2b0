"""Co-activation on the device: who was chosen together in one token, whatever their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from guard.device.evidence import SignalReducer
from guard.device.layout import Capacity
from guard.device.tap import RoutingTap
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.topology import MoELayer, Topology

TOPOLOGY = Topology("X", (MoELayer(0, 8, 3), MoELayer(2, 8, 2), MoELayer(3, 8, 3)))
NOBODY = -1
# Of each layer the chosen experts; the members are 1 and 4, everywhere.
TOKENS = [
    [[0, 2, 1], [3, 4, NOBODY], [7, 4, 1]],  # in three layers, four members
    [[1, 4, 0], [0, 2, NOBODY], [0, 2, 3]],  # in one layer, two members
    [[0, 2, 3], [1, 0, NOBODY], [5, 6, 4]],  # in two layers, two members
    [[0, 2, 3], [0, 2, NOBODY], [5, 6, 7]],
]


def indicators(sets: Mapping[str, Sequence[int]], *togethers: str) -> list[list[int]]:
    """Of each token, whether each of `togethers` counts it: the set, and how much of it at least."""
    rules = "".join(
        f"    - {{name: r{n}, when: {{coactivation: {{experts: {together}, atLeast: 1}}}}}}\n"
        for n, together in enumerate(togethers)
    )
    experts = "".join(
        f"    {name}: [{{layers: [0, 2, 3], experts: {list(ids)}}}]\n" for name, ids in sets.items()
    )
    text = (
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\n"
        f"spec:\n  experts:\n{experts}  rules:\n{rules}"
    )
    program = compile_policies(parse_policies(text), TOPOLOGY)
    device = torch.device("cpu")
    tap = RoutingTap(TOPOLOGY, Capacity(8, 1), device)
    ids = torch.from_numpy(np.array(TOKENS, dtype=np.int32))
    for layer, facts in enumerate(TOPOLOGY.layers):
        tap.record(layer, ids[:, layer, : facts.top_k], torch.ones(len(TOKENS), facts.top_k))
    reducer = SignalReducer(program.signals, program.distributions, TOPOLOGY, device)
    signal_TX = reducer.signals(reducer.reduce(tap, len(TOKENS)))
    rows = program.readings.signal[program.conditions.numerator]
    found: list[list[int]] = signal_TX[:, rows].tolist()
    return found


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        ("layers: 2", [1, 0, 1, 0]),
        ("layers: 3", [1, 0, 0, 0]),
        ("members: 2", [1, 1, 1, 0]),
        ("members: 4", [1, 0, 0, 0]),
    ],
)
def test_a_token_counts_where_it_chose_enough_of_the_set(together: str, expected: list[int]) -> None:
    assert [row[0] for row in indicators({"f": [1, 4]}, f"f, {together}")] == expected


def test_more_sets_than_a_word_has_bits_are_told_apart() -> None:
    sets = {f"s{n}": [e for e in range(8) if n >> e & 1] for n in range(1, 2 * 64 + 6)}
    expected = [
        [int(sum(bool(set(layer) & set(ids)) for layer in token) >= 2) for ids in sets.values()]
        for token in TOKENS
    ]

    assert indicators(sets, *(f"{name}, layers: 2" for name in sets)) == expected
