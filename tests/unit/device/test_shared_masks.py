"""Rows of several engines that go over to another program at different steps: each row is masked as its
own engine asks, by the program that the engine was at."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.device.layout import Capacity
from guard.device.mask import ExpertMask
from guard.program.program import MaskMethodCode, MaskTable
from guard.program.topology import MoELayer, Topology
from tests.unit.device.test_mask import mask_table

ENGINES, ROWS, EXPERTS, ACTIONS = 3, 2, 6, 3
TOPOLOGY = Topology("T", (MoELayer(0, EXPERTS, 2), MoELayer(1, EXPERTS, 2)))
CPU = torch.device("cpu")
METHODS = np.array([MaskMethodCode.REROUTE, MaskMethodCode.DROP, MaskMethodCode.FORCE])


def engine() -> ExpertMask:
    made = ExpertMask(TOPOLOGY, Capacity(ROWS, 1, 1), CPU)
    made.share()
    return made


flags = st.lists(st.booleans(), min_size=2 * EXPERTS * ACTIONS, max_size=2 * EXPERTS * ACTIONS)
in_force = st.lists(st.booleans(), min_size=ROWS * ACTIONS, max_size=ROWS * ACTIONS)


@settings(max_examples=60)
@given(st.data())
def test_each_row_is_masked_by_the_program_its_engine_is_at(data: st.DataObject) -> None:
    engines = [engine() for _ in range(ENGINES)]
    first = _table(data)
    for one in engines:
        one.install(first)
    _check(data, engines)
    for generation in range(1, data.draw(st.integers(2, 4))):
        table = _table(data)
        prepared = [one.prepare(table) for one in engines]
        for one, bits in zip(engines, prepared, strict=True):
            one.announce(bits, generation)
        for number in data.draw(st.permutations(range(ENGINES))):
            engines[number].put(prepared[number], generation)
            _check(data, engines)


def _table(data: st.DataObject) -> MaskTable:
    return mask_table(np.array(data.draw(flags)).reshape(2, EXPERTS, ACTIONS), METHODS)


def _check(data: st.DataObject, engines: list[ExpertMask]) -> None:
    for one in engines:
        one.set_rows(torch.tensor(data.draw(in_force)).reshape(ROWS, ACTIONS))
    sent = []
    for one in engines:
        assert one.shared is not None
        sent.append(one.shared.sent(one.row_bits_TW[:ROWS]))
    gathered_TX = torch.cat(sent)
    for layer in range(len(TOPOLOGY.layers)):
        asked = [one.wanted(layer, one.row_bits_TW[:ROWS]) for one in engines]
        expected = [torch.cat(parts) for parts in zip(*asked, strict=True)]
        for one in engines:  # whichever engine routes them
            found = one.wanted_of_all(layer, gathered_TX)
            for had, wanted in zip(found, expected, strict=True):
                assert torch.equal(had, wanted)
