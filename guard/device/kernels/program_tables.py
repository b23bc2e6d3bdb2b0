"""A program's tables as flat numpy arrays, as kernels read them. The one place that lays them out.

Letters beyond those of `layout`: P places, a layer's expert each (layer · E + expert).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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
    SparseWeights,
)
from guard.program.step_report import NEVER


class SignalTables(NamedTuple):
    """What a row's evidence is made of, by place: small however many experts and policies there are.

    num_experts_L: int64 [L]
    unit_start_P1: int64 [P + 1], where each place's weights begin in the two that follow
    unit_signal: int64, the number among the unit signals; unit_value: int64, the weight
    spread_start_P1, spread_signal: the same of spread signals, which have no weight
    mass_start_P1, mass_signal, mass_value: of mass signals; the values are float64
    layer_start_L1, layer_signal, layer_value: of layer mass, by layer; numbered behind the mass signals
    sizes: int64 [4], token signals, first column of the spread signals and of the mass signals, E
    """

    num_experts_L: Ints
    unit_start_P1: Ints
    unit_signal: Ints
    unit_value: Ints
    spread_start_P1: Ints
    spread_signal: Ints
    mass_start_P1: Ints
    mass_signal: Ints
    mass_value: Floats
    layer_start_L1: Ints
    layer_signal: Ints
    layer_value: Floats
    sizes: Ints


class DecisionTables(NamedTuple):
    """What decides. Of `signals`, `rules` and `actions`, the function named like it gives the rows.

    signals: int64 [3, X]; rules: int64 [9, R]
    readings: int64 [M, 4], signal, window, tokens, in_output
    conditions: int64 [C, 8], the readings of numerator, tokens and mass, then min_tokens, transform,
        strict, always and the row among conditions on distributions, or -1
    real: float64 [C, 7], `real_table` by condition
    conditions_RC: int64 [R, most], padded with -1
    node_start_R1: int64 [R + 1], where each rule's nodes begin in `node_N`
    node_N: int64, columns of nodes, children before their parents
    nodes: int64 [all nodes, width]; first_node: its first row's column
    actions: int64 [4, A]; set_signal_N: int64 [N]
    """

    signals: Ints
    readings: Ints
    conditions: Ints
    real: Floats
    rules: Ints
    conditions_RC: Ints
    node_start_R1: Ints
    node_N: Ints
    nodes: Ints
    actions: Ints
    set_signal_N: Ints


def signal_tables(program: Program) -> SignalTables:
    signals, topology = program.signals, program.topology
    num_layers, max_experts = len(topology.layers), topology.max_experts
    num_places = num_layers * max_experts
    unit_start_P1, unit_signal, unit_value = _by_place(signals.unit, num_places)
    spread_start_P1, spread_signal, _ = _by_place(signals.spread, num_places)
    mass_start_P1, mass_signal, mass_value = _by_place(signals.mass, num_places)
    layer_start_L1, layer_signal, layer_value = _by_place(signals.layer_mass, num_layers)
    first_spread = signals.num_token_signals + len(signals.unit)
    return SignalTables(
        np.array([layer.num_experts for layer in topology.layers], dtype=np.int64),
        unit_start_P1,
        unit_signal,
        unit_value.astype(np.int64),
        spread_start_P1,
        spread_signal,
        mass_start_P1,
        mass_signal,
        mass_value,
        layer_start_L1,
        layer_signal + len(signals.mass),
        layer_value,
        np.array(
            [
                signals.num_token_signals,
                first_spread,
                first_spread + len(signals.spread),
                max_experts,
            ],
            dtype=np.int64,
        ),
    )


def _by_place(weights: SparseWeights, num_places: int) -> tuple[Ints, Ints, Floats]:
    used = weights.value != 0
    place, signal, value = weights.place[used], weights.signal[used], weights.value[used]
    order = np.argsort(place, kind="stable")
    start_P1 = np.searchsorted(place[order], np.arange(num_places + 1)).astype(np.int64)
    return start_P1, np.ascontiguousarray(signal[order], dtype=np.int64), value[order]


def decision_tables(program: Program) -> DecisionTables:
    readings, table = program.readings, program.conditions
    distribution_C = np.full(table.num_conditions, -1)
    distribution_C[program.distributions.condition] = np.arange(program.distributions.num_conditions)
    node_start_R1, node_N = _nodes_of_rules(program.expressions, program.conditions.num_conditions)
    return DecisionTables(
        signals=_whole(signals_table(program.signals)),
        readings=_whole(
            np.stack([readings.signal, readings.window, readings.tokens, readings.in_output], axis=1)
        ),
        conditions=_whole(
            np.stack(
                [
                    table.numerator,
                    table.tokens,
                    table.mass_denominator,
                    table.min_tokens.clip(min=1),
                    table.transform,
                    table.strict,
                    table.always,
                    distribution_C,
                ],
                axis=1,
            )
        ),
        real=np.ascontiguousarray(real_table(program).T),
        rules=_whole(rules_table(program)),
        conditions_RC=_whole(program.rule_table.conditions),
        node_start_R1=node_start_R1,
        node_N=node_N,
        nodes=_whole(nodes_table(program.expressions)),
        actions=_whole(actions_table(program.masks)),
        set_signal_N=np.array([named.signal for named in program.sets], dtype=np.int64),
    )


def _whole(table: Ints) -> Ints:
    return np.ascontiguousarray(table, dtype=np.int64)


def _nodes_of_rules(table: ExpressionTable, num_conditions: int) -> tuple[Ints, Ints]:
    nodes, first = nodes_table(table) // 2, 1 + num_conditions
    found: list[int] = []
    start = [0]
    for root in table.root.tolist():
        needed, waiting = set[int](), [root]
        while waiting:
            column = waiting.pop()
            if column >= first and column not in needed:
                needed.add(column)
                waiting.extend(nodes[column - first].tolist())
        found.extend(sorted(needed))
        start.append(len(found))
    return np.array(start, dtype=np.int64), np.array(found, dtype=np.int64)


def signals_table(signals: SignalTable) -> Ints:
    first = signals.num_linear
    source, least = np.arange(signals.num_signals), np.full(signals.num_signals, -1)
    source[first:], least[first:] = signals.indicators.signal, signals.indicators.least
    return np.stack([source, signals.token_signal, least])


def conditions_table(program: Program) -> Ints:
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


def real_table(program: Program) -> Floats:
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


def nodes_table(table: ExpressionTable) -> Ints:
    """[nodes, width] of all levels, twice the column and whether it is negated; 0, which is true, is
    behind a node's children."""
    width = max((level.children.shape[1] for level in table.levels), default=1)
    parts = [np.zeros((0, width), dtype=np.int64)]
    for level in table.levels:
        children = 2 * level.children + level.negated
        parts.append(np.pad(children, [(0, 0), (0, width - children.shape[1])]))
    return np.concatenate(parts)


def rules_table(program: Program) -> Ints:
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


def actions_table(masks: MaskTable) -> Ints:
    return np.stack(
        [
            masks.rule,
            ~masks.static,
            masks.release == MaskRelease.CLEAR,
            np.where(masks.release == MaskRelease.TOKENS, masks.tokens, NEVER),
        ]
    )
