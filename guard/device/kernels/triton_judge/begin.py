# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One launch that says for each row of a step whose it is and which masks it is under, and empties its
part of the tap."""

import triton
import triton.language as tl

NEVER = tl.constexpr(2**62)
MASK_INTERVALS = tl.constexpr(4)


@triton.jit(do_not_specialize=range(16))  # else other sizes would compile anew
def begin_kernel(
    slots_B,
    query_start_B1,
    position_T,
    mask_from_SIA,
    mask_to_SIA,
    topk_ids_TLK,
    query_start_out_B1,
    position_out_T,
    request_out_T,
    row_bits_TW,
    num_rows,
    num_requests,
    num_rows_before,
    num_actions,
    num_words,
    tap_size,
    ROWS: tl.constexpr,
    FILL: tl.constexpr,
):
    """Grid: [blocks of ROWS rows], so that all of this step's rows and of the last one's have one.

    query_start_B1, position_T: whole numbers of any width; the outputs are int64
    row_bits_TW: int64 [rows, num_words]; rows behind the step's own get none
    tap_size: ids of a row
    """
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    in_step = row < num_rows
    # The request whose first row is the last one not behind the row.
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + num_requests
    width = num_requests
    while width > 0:
        middle = (low + high) // 2
        end = tl.load(query_start_B1 + middle + 1, mask=in_step & (low < high), other=0)
        is_behind = (low < high) & (end <= row)
        high = tl.where((low < high) & (end > row), middle, high)
        low = tl.where(is_behind, middle + 1, low)
        width = width // 2
    request = tl.minimum(low, num_requests - 1)
    position = tl.load(position_T + row, mask=in_step, other=0).to(tl.int64)
    tl.store(request_out_T + row, request.to(tl.int64), mask=in_step)
    tl.store(position_out_T + row, position, mask=in_step)
    for first in range(block * ROWS, num_requests + 1, tl.num_programs(0) * ROWS):
        place = first + tl.arange(0, ROWS)
        start = tl.load(query_start_B1 + place, mask=place <= num_requests, other=0)
        tl.store(query_start_out_B1 + place, start.to(tl.int64), mask=place <= num_requests)

    slot = tl.load(slots_B + request, mask=in_step, other=0)
    bit = tl.arange(0, 64)
    for word in range(0, num_words):
        action = (word * 64 + bit)[None, :]
        is_action = in_step[:, None] & (action < num_actions)
        in_force = is_action & (action < 0)
        for number in tl.static_range(MASK_INTERVALS):
            at = (slot[:, None] * MASK_INTERVALS + number) * num_actions + action
            start = tl.load(mask_from_SIA + at, mask=is_action, other=NEVER)
            stop = tl.load(mask_to_SIA + at, mask=is_action, other=NEVER)
            here = position[:, None]
            in_force = in_force | (is_action & (start <= here) & (here < stop))
        bits = tl.where(in_force, tl.full([ROWS, 64], 1, tl.int64) << bit.to(tl.int64)[None, :], 0)
        tl.store(
            row_bits_TW + row * num_words + word,
            tl.sum(bits, axis=1),
            mask=(row < num_rows) | (row < num_rows_before),
        )

    first_id = (block * ROWS).to(tl.int64) * tap_size
    end_id = tl.minimum((block + 1) * ROWS, num_rows).to(tl.int64) * tap_size
    for number in range(first_id, end_id, FILL):
        at = number + tl.arange(0, FILL)
        tl.store(topk_ids_TLK + at, tl.full([FILL], -1, tl.int32), mask=at < end_id)
