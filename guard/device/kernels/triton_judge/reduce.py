# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One launch that does what `SignalReducer.reduce` does, and keeps the evidence beside the KV.

A program for each row and block of columns goes through the row's chosen experts in the order of
layers; a lane is a column. A table of all experts' weights is read, not a list of each column's
experts: the work grows with what was chosen, neighbouring lanes read neighbouring numbers.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(table, num_columns, column, mask, expert_id, num_experts, gate, first_of_layer):
    """int32: each column's weight of a chosen expert; 0 of what is none, or has no weight."""
    is_chosen = (expert_id >= 0) & (expert_id < num_experts) & (gate != 0)
    place = tl.where(is_chosen, first_of_layer + expert_id, 0)
    weight = tl.load(table + place.to(tl.int64) * num_columns + column, mask=mask, other=0)
    return tl.where(is_chosen, weight, 0)


@triton.jit(do_not_specialize=range(25))  # else other sizes would compile anew
def reduce_kernel(
    topk_ids_TLK,
    topk_weights_TLK,
    experts_L,
    table,
    trusted_T,
    evidence_TX,
    kv_slot_T,
    request_T,
    query_start_B1,
    rejected_B,
    written_K,
    narrow_KX,
    wide_KX,
    place_X,
    num_layers,
    max_experts,
    num_tokens,
    num_unit,
    num_spread,
    num_columns,
    trusted_stride,
    dustbin,
    narrow_width,
    wide_width,
    tag,
    TOP_K: tl.constexpr,
    KEEPS: tl.constexpr,
    HAS_REJECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [T, blocks]. Columns: unit, spread, mass, layer mass; those of tokens are in front.

    topk_ids_TLK, topk_weights_TLK: as in `RoutingTap`
    experts_L: int32, of each layer
    table: int32 [L · max_experts, columns]
    trusted_T: bool, read in steps of `trusted_stride`; the evidence of other rows is 0
    kv_slot_T: where the row's KV is written, negative where it is not; read where it `KEEPS`
    rejected_B: as in `StepEvaluator.evaluate`; nothing is kept of those rows
    written_K, narrow_KX, wide_KX: as in `KeptEvidence`
    place_X: of each column in one of the latter two
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * BLOCK
    in_row = row * num_layers * TOP_K
    first_mass = num_unit + num_spread
    is_unit = column < num_unit
    is_spread = (column >= num_unit) & (column < first_mass)
    is_mass = (column >= first_mass) & (column < num_columns)
    total = tl.zeros([BLOCK], tl.int64)
    if first < num_unit:
        for layer in tl.range(0, num_layers, loop_unroll_factor=2):
            num_experts = tl.load(experts_L + layer)
            for k in tl.static_range(TOP_K):
                at = in_row + layer * TOP_K + k
                expert_id, gate = tl.load(topk_ids_TLK + at), tl.load(topk_weights_TLK + at)
                weight = _weights(
                    table,
                    num_columns,
                    column,
                    is_unit,
                    expert_id,
                    num_experts,
                    gate,
                    layer * max_experts,
                )
                total += weight.to(tl.int64)
    if (first < first_mass) & (first + BLOCK > num_unit):
        for layer in tl.range(0, num_layers, loop_unroll_factor=2):
            num_experts = tl.load(experts_L + layer)
            hit = tl.zeros([BLOCK], tl.int32)
            for k in tl.static_range(TOP_K):
                at = in_row + layer * TOP_K + k
                expert_id, gate = tl.load(topk_ids_TLK + at), tl.load(topk_weights_TLK + at)
                hit |= _weights(
                    table,
                    num_columns,
                    column,
                    is_spread,
                    expert_id,
                    num_experts,
                    gate,
                    layer * max_experts,
                )
            total += (hit != 0).to(tl.int64)
    if first + BLOCK > first_mass:
        mass = tl.zeros([BLOCK], tl.float64)
        for layer in tl.range(0, num_layers, loop_unroll_factor=2):
            num_experts = tl.load(experts_L + layer)
            for k in tl.static_range(TOP_K):
                at = in_row + layer * TOP_K + k
                expert_id, gate = tl.load(topk_ids_TLK + at), tl.load(topk_weights_TLK + at)
                weight = _weights(
                    table,
                    num_columns,
                    column,
                    is_mass,
                    expert_id,
                    num_experts,
                    gate,
                    layer * max_experts,
                )
                is_finite = (gate == gate) & (tl.abs(gate) != float("inf"))
                mass += tl.where(is_finite, gate, 0.0).to(tl.float64) * weight.to(tl.float64)
        # Half to even.
        below = tl.floor(mass)
        rest = mass - below
        whole = below.to(tl.int64)
        total += tl.where((rest > 0.5) | ((rest == 0.5) & (whole % 2 != 0)), whole + 1, whole)
    trusted = tl.load(trusted_T + row * trusted_stride) != 0
    total = tl.where(trusted, total, 0)
    evidence = evidence_TX + row * (num_tokens + num_columns)
    tl.store(evidence + num_tokens + column, total, mask=column < num_columns)
    seen = tl.where(trusted, 1, 0)
    if first == 0:
        for number in range(0, num_tokens):
            tl.store(evidence + number, seen.to(tl.int64))
    if KEEPS:
        at = tl.load(kv_slot_T + row).to(tl.int64)
        if HAS_REJECTED:
            request = tl.load(request_T + row)
            end_row = tl.load(query_start_B1 + request + 1) - tl.load(rejected_B + request)
            at = tl.where(row < end_row, at, -1)
        at = tl.where(at >= 0, at, dustbin)
        place = tl.load(place_X + column, mask=column < num_columns, other=0)
        narrow = narrow_KX + at * narrow_width + place
        tl.store(narrow, total.to(narrow_KX.dtype.element_ty), mask=column < first_mass)
        tl.store(wide_KX + at * wide_width + place, total, mask=is_mass)
        if first == 0:
            tl.store(written_K + at, (seen * tag).to(tl.int32))
