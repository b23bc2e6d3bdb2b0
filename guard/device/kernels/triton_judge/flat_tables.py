"""A program's tables in two flat arrays, so that a kernel takes two addresses and compiles once for all
programs: a reload brings other numbers, no other code. `places` names the orders below."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from guard.device.kernels.program_tables import (
    actions_table,
    conditions_table,
    nodes_table,
    real_table,
    rules_table,
    signals_table,
)
from guard.device.kernels.triton_judge import places
from guard.device.state import host_to_device
from guard.program.program import Program, WindowKind


class FlatTables(NamedTuple):
    """whole: int64, a head and then families of arrays; real: float64 [7, C]"""

    whole: torch.Tensor
    real: torch.Tensor


def flat_tables(program: Program, device: torch.device) -> FlatTables:
    rules, levels = program.rule_table, program.expressions.levels
    has_recent = bool((program.readings.window == WindowKind.RECENT).any())
    nodes = nodes_table(program.expressions)
    sizes = [
        program.signals.num_signals,
        program.signals.num_evidence,
        program.conditions.num_conditions,
        len(nodes),
        len(levels),
        nodes.shape[1],
        rules.num_rules,
        rules.conditions.shape[1],
        program.masks.num_actions,
        len(program.sets),
        max(1, program.readings.longest_tokens) if has_recent else 1,
        max(1, rules.longest_persistence),
    ]
    families = [
        signals_table(program.signals),
        conditions_table(program),
        nodes,
        np.cumsum([0, *(len(level.children) for level in levels)]),
        rules_table(program),
        rules.conditions,
        actions_table(program.masks),
        np.array([named.signal for named in program.sets], dtype=np.int64),
    ]
    first = places.HEAD_SIZE.value + np.cumsum([0, *(family.size for family in families)])[:-1]
    assert len(sizes) + len(families) == places.HEAD_SIZE.value
    whole = np.concatenate([sizes, first, *(family.ravel() for family in families)])
    return FlatTables(
        host_to_device(whole.astype(np.int64), device), host_to_device(real_table(program), device)
    )
