# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One launch that gives slots to requests, from one copy of what is known of them."""

import triton
import triton.language as tl

NEVER = tl.constexpr(2**62)
MASK_INTERVALS = tl.constexpr(4)
NUM_FACTS = tl.constexpr(3)
"""Slot, prompt tokens, next position; then R applies, enforced and exempt, A mask starts and ends."""


@triton.jit
def _fill(first, size, value, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(first + at, value, mask=at < size)


@triton.jit
def _copy_flags(target, source, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        flag = tl.load(source + at, mask=at < size, other=0) != 0
        tl.store(target + at, flag, mask=at < size)


@triton.jit(do_not_specialize=range(23))  # else other sizes would compile anew
def admit_kernel(
    facts_N,
    next_position_S,
    prompt_tokens_S,
    unseen_S,
    sum_SX,
    prompt_sum_SX,
    recent_sum_SQX,
    hits_SR,
    recent_hits_SHR,
    active_SR,
    applies_SR,
    enforced_SR,
    exempt_SR,
    mask_from_SIA,
    mask_to_SIA,
    block_at_SR,
    extreme_SC,
    num_signals,
    num_recent_sums,
    num_rules,
    num_recent_hits,
    num_actions,
    num_conditions,
    BLOCK: tl.constexpr,
):
    """Grid: [N]. facts_N: int64; the tensors are those of `SlotState`; num_recent_*: of a slot"""
    facts = facts_N + tl.program_id(0) * (NUM_FACTS + 3 * num_rules + 2 * num_actions)
    slot = tl.load(facts)
    tl.store(prompt_tokens_S + slot, tl.load(facts + 1))
    tl.store(next_position_S + slot, tl.load(facts + 2))
    tl.store(unseen_S + slot, tl.full([], 0, tl.int64))
    _fill(sum_SX + slot * num_signals, num_signals, 0, BLOCK)
    _fill(prompt_sum_SX + slot * num_signals, num_signals, 0, BLOCK)
    _fill(recent_sum_SQX + slot * num_recent_sums, num_recent_sums, 0, BLOCK)
    _fill(hits_SR + slot * num_rules, num_rules, 0, BLOCK)
    _fill(recent_hits_SHR + slot * num_recent_hits, num_recent_hits, 0, BLOCK)
    _fill(block_at_SR + slot * num_rules, num_rules, NEVER, BLOCK)
    _fill(extreme_SC + slot * num_conditions, num_conditions, float("nan"), BLOCK)
    of_rules = facts + NUM_FACTS
    _copy_flags(applies_SR + slot * num_rules, of_rules, num_rules, BLOCK)
    _copy_flags(enforced_SR + slot * num_rules, of_rules + num_rules, num_rules, BLOCK)
    _copy_flags(exempt_SR + slot * num_rules, of_rules + 2 * num_rules, num_rules, BLOCK)
    for start in range(0, num_rules, BLOCK):
        r = start + tl.arange(0, BLOCK)
        tl.store(active_SR + slot * num_rules + r, r < 0, mask=r < num_rules)
    of_actions = of_rules + 3 * num_rules
    for start in range(0, num_actions, BLOCK):
        a = start + tl.arange(0, BLOCK)
        in_a = a < num_actions
        first = slot * MASK_INTERVALS * num_actions + a
        tl.store(mask_from_SIA + first, tl.load(of_actions + a, mask=in_a, other=0), mask=in_a)
        stop = tl.load(of_actions + num_actions + a, mask=in_a, other=0)
        tl.store(mask_to_SIA + first, stop, mask=in_a)
        for number in tl.static_range(1, MASK_INTERVALS):
            tl.store(mask_from_SIA + first + number * num_actions, NEVER, mask=in_a)
            tl.store(mask_to_SIA + first + number * num_actions, NEVER, mask=in_a)
