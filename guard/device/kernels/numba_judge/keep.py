"""What is kept of a step's evidence beside its KV. Plain Python that numba compiles."""

from __future__ import annotations

from typing import Any


def keep(
    evidence_TX: Any,
    query_start_B1: Any,
    rejected_B: Any,
    kv_slot_T: Any,
    narrow_source: Any,
    wide_source: Any,
    tag: Any,
    written_K: Any,
    narrow_KX: Any,
    wide_KX: Any,
) -> None:
    """As `KeepRows.write`, but for the dustbin, which stays as it is.

    rejected_B: int64 [B], or [0] where there are none
    """
    for request in range(len(query_start_B1) - 1):
        stop = query_start_B1[request + 1]
        if len(rejected_B):
            stop -= rejected_B[request]
        for row in range(query_start_B1[request], stop):
            at = kv_slot_T[row]
            if at < 0:
                continue
            for column in range(len(narrow_source)):
                narrow_KX[at, column] = evidence_TX[row, narrow_source[column]]
            for column in range(len(wide_source)):
                wide_KX[at, column] = evidence_TX[row, wide_source[column]]
            written_K[at] = evidence_TX[row, 0] * tag
