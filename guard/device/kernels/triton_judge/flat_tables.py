"""A program's tables in two flat arrays, so that a kernel takes two addresses and compiles once for all
programs: a reload brings other numbers, no other code. `places` names the orders below."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from guard.device.kernels.triton_judge import places
from guard.program.program import (
    ActionKind,
    ExpressionTable,
    Floats,
    Ints,
    MaskRelease,
    MaskTable,
    Program,
    ReadingTable,
    SignalTable,
    WindowKind,
)
from guard.program.step_report import NEVER


class FlatTables(NamedTuple):
    """whole: int64, a head and then families of arrays; real: float64 [7, C]"""

    whole: torch.Tensor
    real: torch.Tensor


def flat_tables(program: Program, device: torch.device) -> FlatTables:
    rules, levels = program.rule_table, program.expressions.levels
    has_recent = bool((program.readings.window == WindowKind.RECENT).any())
    nodes = _nodes(program.expressions)
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
        _signals(program.signals),
        _conditions(program),
        nodes,
        np.cumsum([0, *(len(level.children) for level in levels)]),
        _rules(program),
        rules.conditions,
        _actions(program.masks),
        np.array([named.signal for named in program.sets], dtype=np.int64),
    ]
    first = places.HEAD_SIZE.value + np.cumsum([0, *(family.size for family in families)])[:-1]
    assert len(sizes) + len(families) == places.HEAD_SIZE.value
    whole = np.concatenate([sizes, first, *(family.ravel() for family in families)])
    return FlatTables(
        torch.from_numpy(whole.astype(np.int64)).to(device),
        torch.from_numpy(_real(program)).to(device),
    )


def _signals(signals: SignalTable) -> Ints:
    first = signals.num_linear
    source, least = np.arange(signals.num_signals), np.full(signals.num_signals, -1)
    source[first:], least[first:] = signals.indicators.signal, signals.indicators.least
    return np.stack([source, signals.token_signal, least])


def _conditions(program: Program) -> Ints:
    table, readings = program.conditions, program.readings
    rule_of_condition = np.zeros(table.num_conditions, dtype=np.int64)
    for rule, of_rule in enumerate(program.rule_table.conditions):
        rule_of_condition[of_rule[of_rule >= 0]] = rule
    mass = _readings(readings, table.mass_denominator.clip(min=0))
    mass[0, table.mass_denominator < 0] = -1
    others = [
        table.min_tokens.clip(min=1),
        table.transform,
        table.strict,
        table.always,
        rule_of_condition,
    ]
    return np.concatenate(
        [_readings(readings, table.numerator), _readings(readings, table.tokens), mass, others]
    )


def _readings(readings: ReadingTable, number: Ints) -> Ints:
    return np.stack(
        [
            readings.signal[number],
            readings.window[number],
            readings.tokens[number],
            readings.in_output[number],
        ]
    )


def _real(program: Program) -> Floats:
    table = program.conditions
    scale_C = program.signals.scale[program.readings.signal][table.numerator]
    limit_C = table.limit * table.sign
    return np.stack(
        [
            table.offset * scale_C,
            table.per_token * scale_C,
            table.constant * scale_C,
            table.bias,
            limit_C + table.tolerance,
            limit_C - table.tolerance,
            table.sign,
        ]
    )


def _nodes(table: ExpressionTable) -> Ints:
    """[nodes, width] of all levels, twice the column and whether it is negated; 0, which is true, is
    behind a node's children."""
    width = max((level.children.shape[1] for level in table.levels), default=1)
    parts = [np.zeros((0, width), dtype=np.int64)]
    for level in table.levels:
        children = 2 * level.children + level.negated
        parts.append(np.pad(children, [(0, 0), (0, width - children.shape[1])]))
    return np.concatenate(parts)


def _rules(program: Program) -> Ints:
    rules, table = program.rule_table, program.expressions
    return np.stack(
        [
            2 * table.root + table.root_negated,
            rules.in_prompt,
            rules.in_output,
            rules.hits,
            rules.of,
            rules.blocks,
            np.array([rule.action is not ActionKind.OBSERVE for rule in program.rules]),
            rules.oldest_tokens,
            rules.newest_tokens,
        ]
    )


def _actions(masks: MaskTable) -> Ints:
    return np.stack(
        [
            masks.rule,
            ~masks.static,
            masks.release == MaskRelease.CLEAR,
            np.where(masks.release == MaskRelease.TOKENS, masks.tokens, NEVER),
        ]
    )
