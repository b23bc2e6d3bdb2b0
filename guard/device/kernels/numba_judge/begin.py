"""What a step begins with. Plain Python that numba compiles."""

from __future__ import annotations

from typing import Any

import numpy as np


def begin(
    slots_B: Any,
    query_start_B1: Any,
    position_T: Any,
    mask_from_SIA: Any,
    mask_to_SIA: Any,
    num_rows_before: Any,
    ids_TLK: Any,
    row_bits_TW: Any,
    request_T: Any,
) -> None:
    """Write whose each row is, empty the rows' part of the tap, and put their masks in force.

    num_rows_before: so many rows may be under masks of the step before
    row_bits_TW: int64, or [0, W] where nothing is masked; request_T: int64 [T]
    """
    num_rows, num_actions = len(position_T), mask_from_SIA.shape[2]
    ids_TLK[:num_rows] = -1
    is_masking = len(row_bits_TW) > 0
    if is_masking:
        row_bits_TW[: max(num_rows, num_rows_before)] = 0
    for request in range(len(slots_B)):
        slot = slots_B[request]
        first_row, stop_row = query_start_B1[request], query_start_B1[request + 1]
        request_T[first_row:stop_row] = request
        if not is_masking:
            continue
        for action in range(num_actions):
            bit = np.int64(1) << np.int64(action & 63)
            for place in range(mask_from_SIA.shape[1]):
                first, stop = mask_from_SIA[slot, place, action], mask_to_SIA[slot, place, action]
                if first >= stop:
                    continue
                for row in range(first_row, stop_row):
                    if first <= position_T[row] and position_T[row] < stop:
                        row_bits_TW[row, action >> 6] |= bit
    request_T[query_start_B1[len(slots_B)] :] = len(slots_B)  # as a search for the row finds
