"""Evidence of a step's rows, from the experts that the rows chose. Plain Python that numba compiles.

It adds in the order of layers and choices, as the twin does; the rest is whole numbers. What it costs
is what the chosen experts weigh, not what the program has.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def reduce(
    ids_TLK: Any,
    weights_TLK: Any,
    num_experts_L: Any,
    unit_start_P1: Any,
    unit_signal: Any,
    unit_value: Any,
    spread_start_P1: Any,
    spread_signal: Any,
    mass_start_P1: Any,
    mass_signal: Any,
    mass_value: Any,
    layer_start_L1: Any,
    layer_signal: Any,
    layer_value: Any,
    sizes: Any,
    trusted_T: Any,
    evidence_TX: Any,
) -> None:
    """Write all of `evidence_TX`, int64 [T, columns]; see `SignalTables` for the others.

    trusted_T: bool [T], or [1] for all rows; the others' evidence is 0
    """
    num_rows = evidence_TX.shape[0]
    num_layers, top_k = ids_TLK.shape[1], ids_TLK.shape[2]
    num_tokens, first_spread, first_mass, max_experts = sizes[0], sizes[1], sizes[2], sizes[3]
    num_columns = evidence_TX.shape[1]
    masses = np.zeros(num_columns - first_mass, dtype=np.float64)
    last_layer = np.full(first_mass - first_spread, -1, dtype=np.int64)
    for row in range(num_rows):
        if not trusted_T[row if len(trusted_T) > 1 else 0]:
            evidence_TX[row] = 0
            continue
        evidence_TX[row, :num_tokens] = 1
        evidence_TX[row, num_tokens:] = 0
        masses[:] = 0.0
        last_layer[:] = -1
        for layer in range(num_layers):
            for choice in range(top_k):
                expert = np.int64(ids_TLK[row, layer, choice])
                gate = np.float64(weights_TLK[row, layer, choice])
                if expert < 0 or expert >= num_experts_L[layer] or gate == 0.0:
                    continue
                place = layer * max_experts + expert
                for at in range(unit_start_P1[place], unit_start_P1[place + 1]):
                    evidence_TX[row, num_tokens + unit_signal[at]] += unit_value[at]
                for at in range(spread_start_P1[place], spread_start_P1[place + 1]):
                    signal = spread_signal[at]
                    if last_layer[signal] != layer:
                        last_layer[signal] = layer
                        evidence_TX[row, first_spread + signal] += 1
                if not np.isfinite(gate):
                    continue
                for at in range(mass_start_P1[place], mass_start_P1[place + 1]):
                    masses[mass_signal[at]] += mass_value[at] * gate
                for at in range(layer_start_L1[layer], layer_start_L1[layer + 1]):
                    masses[layer_signal[at]] += layer_value[at] * gate
        for mass in range(num_columns - first_mass):
            evidence_TX[row, first_mass + mass] = np.int64(np.rint(masses[mass]))
