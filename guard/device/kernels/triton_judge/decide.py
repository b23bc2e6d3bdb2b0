# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One launch that does what `StepEvaluator.evaluate` does: a program for each request goes through the
request's rows, then the last one to end packs the firings of all.

Phases of a request's program, with a barrier between two whenever lanes read what others wrote: sums up
to each row; conditions; the levels of expressions; rules; masks; what the slot keeps. Within a phase
a block of conditions, rules or actions goes through all rows before the next block does. The arithmetic
is the twin's, operation by operation: see there for why.
"""

import triton
import triton.language as tl

from guard.device.kernels.triton_judge import places

NEVER = tl.constexpr(2**62)
FALSE = tl.constexpr(0)
UNKNOWN = tl.constexpr(1)
TRUE = tl.constexpr(2)
WINDOW_RECENT = tl.constexpr(0)
WINDOW_PROMPT = tl.constexpr(2)
WINDOW_OUTPUT = tl.constexpr(3)
LOGISTIC = tl.constexpr(1)
NEGATIVE_LOG = tl.constexpr(2)
MASK_INTERVALS = tl.constexpr(4)
NUM_REQUEST_COLUMNS = tl.constexpr(7)
NUM_EVENT_COLUMNS = tl.constexpr(7)
OTHER_FIRING = tl.constexpr(1)
ACTING_FIRING = tl.constexpr(2)
"""The first firing in the step of a request's rule that acts."""


@triton.jit
def _signal_at_row(whole, evidence_row, x, in_x):
    """int64: the row's signals `x`, indicators among them."""
    num_signals = tl.load(whole + places.HEAD_SIGNALS)
    table = whole + tl.load(whole + places.HEAD_OF_SIGNALS)
    source = tl.load(table + places.SIGNAL_SOURCE * num_signals + x, mask=in_x, other=0)
    tokens = tl.load(table + places.SIGNAL_TOKENS * num_signals + x, mask=in_x, other=0)
    least = tl.load(table + places.SIGNAL_LEAST * num_signals + x, mask=in_x, other=-1)
    value = tl.load(evidence_row + source, mask=in_x, other=0)
    seen = tl.load(evidence_row + tokens, mask=in_x, other=0)
    return tl.where(least < 0, value, tl.where(value >= least, seen, 0))


@triton.jit
def _reading(
    table,
    num_conditions,
    c,
    in_c,
    at_row_here,
    row_size,
    prompt_sum,
    before_sum,
    recent_sum,
    window_size,
    position,
    prompt,
    begin,
    next_position,
):
    """int64: a reading of each condition at a row, as `WindowReader` reads it."""
    signal = tl.load(table + places.READING_SIGNAL * num_conditions + c, mask=in_c, other=-1)
    window = tl.load(table + places.READING_WINDOW * num_conditions + c, mask=in_c, other=0)
    tokens = tl.load(table + places.READING_TOKENS * num_conditions + c, mask=in_c, other=0)
    in_output = tl.load(table + places.READING_IN_OUTPUT * num_conditions + c, mask=in_c, other=0)
    in_c = signal >= 0
    here = tl.load(at_row_here + signal, mask=in_c, other=0)
    up_to_prompt = tl.load(prompt_sum + signal, mask=in_c, other=0)
    is_recent = in_c & (window == WINDOW_RECENT)
    back_to = position - tokens
    before = tl.maximum(back_to, -1)
    in_step = before >= begin
    still = (before >= next_position - 1) & (before < begin)
    in_ring = (before >= 0) & (before < next_position - 1)
    start = tl.load(
        at_row_here + signal - (position - before) * row_size, mask=is_recent & in_step, other=0
    )
    start += tl.load(before_sum + signal, mask=is_recent & still, other=0)
    place = tl.where(in_ring, before, 0) % window_size
    start += tl.load(recent_sum + place * row_size + signal, mask=is_recent & in_ring, other=0)
    start = tl.where((in_output != 0) & (back_to < prompt), up_to_prompt, start)
    of_prompt = tl.where(position >= prompt - 1, up_to_prompt, 0)
    of_output = tl.where(position >= prompt, here - up_to_prompt, 0)
    value = tl.where(is_recent, here - start, here)
    value = tl.where(window == WINDOW_PROMPT, of_prompt, value)
    return tl.where(window == WINDOW_OUTPUT, of_output, value)


@triton.jit
def _evaluated(rules, num_rules, r, in_r, applies, evidence_row, in_prompt):
    """bool: the rule applies, the row is in its phase, and the oldest of its signals saw it, and so did
    the one that is 1 for every token that was seen."""
    phase = tl.where(in_prompt, places.RULE_IN_PROMPT, places.RULE_IN_OUTPUT)
    in_phase = tl.load(rules + phase * num_rules + r, mask=in_r, other=0)
    oldest = tl.load(rules + places.RULE_OLDEST_TOKENS * num_rules + r, mask=in_r, other=0)
    seen = tl.load(evidence_row + oldest, mask=in_r, other=0)
    return (in_phase != 0) & (applies != 0) & (seen != 0)


@triton.jit(do_not_specialize=range(37))  # else other sizes would compile anew
def decide_kernel(
    evidence,
    slots_B,
    query_start_B1,
    position_T,
    request_T,
    rejected_B,
    computed_B,
    whole,
    real,
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
    scratch,
    counters,
    requests_B,
    masked_BW,
    extremes_BC,
    events_V,
    values_V,
    num_events,
    num_rows,
    num_requests,
    max_events,
    max_values,
    HAS_REJECTED: tl.constexpr,
    HAS_COMPUTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
):
    """Grid: [B]. Arguments are as in `StepEvaluator.evaluate`, `SlotState` and `StepDecisions`; all
    contiguous, bools as int8.

    scratch: int64; of each row the sums, the hits, the values (float64), then in bytes the expression
        columns and which rules fired
    counters: int64 [2], firings so far, programs that ended; both 0 before and after
    """
    num_signals = tl.load(whole + places.HEAD_SIGNALS)
    num_evidence = tl.load(whole + places.HEAD_EVIDENCE)
    num_conditions = tl.load(whole + places.HEAD_CONDITIONS)
    num_nodes = tl.load(whole + places.HEAD_NODES)
    num_rules = tl.load(whole + places.HEAD_RULES)
    num_actions = tl.load(whole + places.HEAD_ACTIONS)
    num_sets = tl.load(whole + places.HEAD_SETS)
    window_size = tl.load(whole + places.HEAD_WINDOW)
    persistence = tl.load(whole + places.HEAD_PERSISTENCE)
    conditions = whole + tl.load(whole + places.HEAD_OF_CONDITIONS)
    rules = whole + tl.load(whole + places.HEAD_OF_RULES)
    lane = tl.arange(0, BLOCK)

    sums = scratch
    hits = sums + num_rows * num_signals
    values = (hits + num_rows * num_rules).to(tl.pointer_type(tl.float64))
    columns = (values + num_rows * num_conditions).to(tl.pointer_type(tl.int8))
    num_columns = 1 + num_conditions + num_nodes
    fired = columns + num_rows * num_columns

    request = tl.program_id(0)
    slot = tl.load(slots_B + request)
    first_of_request = tl.load(query_start_B1 + request)
    end_of_request = tl.load(query_start_B1 + request + 1)
    next_position = tl.load(next_position_S + slot)
    prompt = tl.load(prompt_tokens_S + slot)
    start_position = tl.load(position_T + first_of_request)
    end_row = end_of_request
    if HAS_REJECTED:
        end_row -= tl.load(rejected_B + request)
    begin = tl.maximum(next_position, start_position)
    after = tl.maximum(next_position, start_position + end_row - first_of_request)
    first_row = tl.minimum(first_of_request + (begin - start_position), end_row)
    if slot == 0:  # nobody's: no row is fresh
        first_row = end_row
        after = next_position
    is_any_fresh = first_row < end_row
    last_row = tl.maximum(end_row - 1, 0)

    # Sums up to each row.
    for x0 in range(0, num_signals, BLOCK):
        x = x0 + lane
        in_x = x < num_signals
        total = tl.load(sum_SX + slot * num_signals + x, mask=in_x, other=0)
        for row in range(first_row, end_row):
            total += _signal_at_row(whole, evidence + row * num_evidence, x, in_x)
            tl.store(sums + row * num_signals + x, total, mask=in_x)
    tl.debug_barrier()

    # Sums up to the end of the prompt, where that is in these rows.
    ends_prompt = (prompt - 1 >= begin) & (prompt - 1 < after)
    prompt_sum = prompt_sum_SX + slot * num_signals
    if ends_prompt:
        prompt_row = first_row + (prompt - 1 - begin)
        for x0 in range(0, num_signals, BLOCK):
            x = x0 + lane
            in_x = x < num_signals
            here = tl.load(sums + prompt_row * num_signals + x, mask=in_x, other=0)
            tl.store(prompt_sum + x, here, mask=in_x)
        tl.debug_barrier()

    # Conditions.
    for c0 in range(0, num_conditions, BLOCK):
        c = c0 + lane
        in_c = c < num_conditions
        rule = tl.load(conditions + places.CONDITION_RULE * num_conditions + c, mask=in_c, other=0)
        applies = tl.load(applies_SR + slot * num_rules + rule, mask=in_c, other=0)
        min_tokens = tl.load(
            conditions + places.CONDITION_MIN_TOKENS * num_conditions + c, mask=in_c, other=1
        )
        transform = tl.load(
            conditions + places.CONDITION_TRANSFORM * num_conditions + c, mask=in_c, other=0
        )
        strict = tl.load(conditions + places.CONDITION_STRICT * num_conditions + c, mask=in_c, other=0)
        always = tl.load(conditions + places.CONDITION_ALWAYS * num_conditions + c, mask=in_c, other=0)
        has_mass = tl.load(conditions + places.MASS * num_conditions + c, mask=in_c, other=-1) >= 0
        offset = tl.load(real + places.CONDITION_OFFSET * num_conditions + c, mask=in_c, other=0.0)
        per_token = tl.load(
            real + places.CONDITION_PER_TOKEN * num_conditions + c, mask=in_c, other=0.0
        )
        constant = tl.load(real + places.CONDITION_CONSTANT * num_conditions + c, mask=in_c, other=0.0)
        bias = tl.load(real + places.CONDITION_BIAS * num_conditions + c, mask=in_c, other=0.0)
        highest_met = tl.load(
            real + places.CONDITION_HIGHEST_MET * num_conditions + c, mask=in_c, other=0.0
        )
        lowest_met = tl.load(
            real + places.CONDITION_LOWEST_MET * num_conditions + c, mask=in_c, other=0.0
        )
        sign = tl.load(real + places.CONDITION_SIGN * num_conditions + c, mask=in_c, other=1.0)
        extreme = tl.load(extreme_SC + slot * num_conditions + c, mask=in_c, other=float("nan"))
        extreme *= sign
        extreme = tl.where(extreme == extreme, extreme, float("-inf"))
        for row in range(first_row, end_row):
            position = begin + (row - first_row)
            at_row = sums + row * num_signals
            tokens = _reading(
                conditions + places.TOKENS * num_conditions,
                num_conditions,
                c,
                in_c,
                at_row,
                num_signals,
                prompt_sum,
                sum_SX + slot * num_signals,
                recent_sum_SQX + slot * window_size * num_signals,
                window_size,
                position,
                prompt,
                begin,
                next_position,
            )
            numerator = _reading(
                conditions + places.NUMERATOR * num_conditions,
                num_conditions,
                c,
                in_c,
                at_row,
                num_signals,
                prompt_sum,
                sum_SX + slot * num_signals,
                recent_sum_SQX + slot * window_size * num_signals,
                window_size,
                position,
                prompt,
                begin,
                next_position,
            )
            mass = _reading(
                conditions + places.MASS * num_conditions,
                num_conditions,
                c,
                in_c,
                at_row,
                num_signals,
                prompt_sum,
                sum_SX + slot * num_signals,
                recent_sum_SQX + slot * window_size * num_signals,
                window_size,
                position,
                prompt,
                begin,
                next_position,
            )
            denominator = tokens.to(tl.float64) * per_token + constant
            denominator = tl.where(has_mass, mass.to(tl.float64), denominator)
            known = (tokens >= min_tokens) & (denominator > 0)
            quotient = (numerator.to(tl.float64) + offset) / tl.where(known, denominator, 1.0)
            positive = tl.where(quotient > 0, quotient, 1.0)
            minus_log = tl.where(quotient > 0, -tl.log(positive), float("inf"))
            minus_log = tl.where(quotient >= 0, minus_log, float("nan"))
            quotient = tl.where(transform == NEGATIVE_LOG, minus_log, quotient)
            signed = quotient * sign
            holds = tl.where(strict != 0, signed > highest_met, signed >= lowest_met)
            truth = tl.where(known, tl.where(holds, TRUE, FALSE), UNKNOWN)
            value = quotient + bias
            exponent = tl.where((transform == LOGISTIC) & known, tl.maximum(-value, -700.0), 0.0)
            logistic = 1.0 / (1.0 + tl.exp(tl.minimum(exponent, 700.0)))
            value = tl.where(transform == LOGISTIC, logistic, value)
            value = tl.where(known, value, float("nan"))
            value = tl.where(always != 0, 1.0, value)
            truth = tl.where(always != 0, TRUE, truth)
            evaluated = _evaluated(
                rules,
                num_rules,
                rule,
                in_c,
                applies,
                evidence + row * num_evidence,
                position < prompt,
            )
            counts = evaluated & (value == value)
            extreme = tl.maximum(extreme, tl.where(counts, value * sign, float("-inf")))
            tl.store(columns + row * num_columns + 1 + c, truth.to(tl.int8), mask=in_c)
            tl.store(values + row * num_conditions + c, value, mask=in_c)
        extreme = tl.where(extreme == float("-inf"), float("nan"), extreme * sign)
        if slot != 0:
            tl.store(extreme_SC + slot * num_conditions + c, extreme, mask=in_c)
        tl.store(extremes_BC + request * num_conditions + c, extreme.to(tl.float32), mask=in_c)
    for row in range(first_row, end_row):
        tl.store(columns + row * num_columns, TRUE)
    tl.debug_barrier()

    # Expressions, a level at a time.
    width = tl.load(whole + places.HEAD_WIDTH)
    nodes = whole + tl.load(whole + places.HEAD_OF_NODES)
    levels = whole + tl.load(whole + places.HEAD_OF_LEVELS)
    for level in range(0, tl.load(whole + places.HEAD_LEVELS)):
        end_node = tl.load(levels + level + 1)
        for node0 in range(tl.load(levels + level), end_node, BLOCK):
            node = node0 + lane
            in_level = node < end_node
            for row in range(first_row, end_row):
                least = tl.full([BLOCK], TRUE, tl.int32)
                for number in range(0, width):
                    child = tl.load(nodes + node * width + number, mask=in_level, other=0)
                    at_child = columns + row * num_columns + child // 2
                    truth = tl.load(at_child, mask=in_level, other=TRUE).to(tl.int32)
                    truth = tl.where(child % 2 != 0, TRUE - truth, truth)
                    least = tl.minimum(least, truth)
                at_node = columns + row * num_columns + 1 + num_conditions + node
                tl.store(at_node, least.to(tl.int8), mask=in_level)
        tl.debug_barrier()

    # Rules.
    block_key = tl.full([], NEVER, tl.int64)
    newest_tokens = tl.full([], 0, tl.int64)
    num_asked = tl.full([], 0, tl.int32)
    num_fired = tl.full([], 0, tl.int64)
    for r0 in range(0, num_rules, BLOCK):
        r = r0 + lane
        in_r = r < num_rules
        root = tl.load(rules + places.RULE_ROOT * num_rules + r, mask=in_r, other=0)
        of = tl.load(rules + places.RULE_OF * num_rules + r, mask=in_r, other=1)
        hits_needed = tl.load(rules + places.RULE_HITS * num_rules + r, mask=in_r, other=1)
        blocks = tl.load(rules + places.RULE_BLOCKS * num_rules + r, mask=in_r, other=0) != 0
        acts = tl.load(rules + places.RULE_ACTS * num_rules + r, mask=in_r, other=0) != 0
        newest = tl.load(rules + places.RULE_NEWEST_TOKENS * num_rules + r, mask=in_r, other=0)
        of_slot = slot * num_rules + r
        applies = tl.load(applies_SR + of_slot, mask=in_r, other=0)
        enforced = tl.load(enforced_SR + of_slot, mask=in_r, other=0) != 0
        active = tl.load(active_SR + of_slot, mask=in_r, other=0) != 0
        block_at = tl.load(block_at_SR + of_slot, mask=in_r, other=NEVER)
        hits_before = tl.load(hits_SR + of_slot, mask=in_r, other=0)
        num_hits = hits_before
        has_fired = lane < 0
        for row in range(first_of_request, first_row):
            tl.store(fired + row * num_rules + r, tl.zeros([BLOCK], tl.int8), mask=in_r)
        for row in range(end_row, end_of_request):
            tl.store(fired + row * num_rules + r, tl.zeros([BLOCK], tl.int8), mask=in_r)
        for row in range(first_row, end_row):
            position = begin + (row - first_row)
            evidence_row = evidence + row * num_evidence
            evaluated = _evaluated(rules, num_rules, r, in_r, applies, evidence_row, position < prompt)
            truth = tl.load(columns + row * num_columns + root // 2, mask=in_r, other=UNKNOWN)
            holds = truth.to(tl.int32) == tl.where(root % 2 != 0, FALSE, TRUE)
            persists = holds & evaluated
            if persistence > 1:
                num_hits += persists.to(tl.int64)
                tl.store(hits + row * num_rules + r, num_hits, mask=in_r)
                before = tl.maximum(position - of, -1)
                in_step = before >= begin
                in_ring = (before >= 0) & (before < next_position - 1)
                at_before = hits + (row - (position - before)) * num_rules + r
                start = tl.load(at_before, mask=in_r & in_step, other=0)
                start += tl.where((before < begin) & (before >= next_position - 1), hits_before, 0)
                place = tl.where(in_ring, before, 0) % persistence
                start += tl.load(
                    recent_hits_SHR + (slot * persistence + place) * num_rules + r,
                    mask=in_r & in_ring,
                    other=0,
                )
                persists = evaluated & (num_hits - start >= hits_needed)
                tl.debug_barrier()  # before the next row reads this one's hits
            result = tl.where(evaluated, persists, active)
            fires = evaluated & result & (active == 0)
            active = result
            is_acting = fires & enforced & acts & (has_fired == 0)
            has_fired = has_fired | fires
            code = tl.where(is_acting, ACTING_FIRING, tl.where(fires, OTHER_FIRING, 0))
            tl.store(fired + row * num_rules + r, code.to(tl.int8), mask=in_r)
            num_fired += tl.sum(fires.to(tl.int64))
            acts_at = tl.maximum(position, prompt - 1)
            block_at = tl.where(fires & blocks & enforced, tl.minimum(block_at, acts_at), block_at)
        if slot != 0:
            tl.store(active_SR + of_slot, active.to(tl.int8), mask=in_r)
            tl.store(block_at_SR + of_slot, block_at, mask=in_r)
            if persistence > 1:
                tl.store(hits_SR + of_slot, num_hits, mask=in_r)
                for row in range(tl.maximum(first_row, end_row - persistence), end_row):
                    place = (begin + (row - first_row)) % persistence
                    kept = tl.load(hits + row * num_rules + r, mask=in_r, other=0)
                    tl.store(
                        recent_hits_SHR + (slot * persistence + place) * num_rules + r,
                        kept,
                        mask=in_r,
                    )
        decided = in_r & (block_at < NEVER)
        key = tl.where(decided, tl.where(decided, block_at, 0) * num_rules + r, NEVER)
        block_key = tl.minimum(block_key, tl.min(key))
        newest_tokens = tl.maximum(newest_tokens, tl.max(tl.where(applies != 0, newest, 0)))
        num_asked += tl.sum((applies != 0).to(tl.int32))
    tl.debug_barrier()

    # Masks: a word of actions at a time.
    mask_from = tl.full([], NEVER, tl.int64)
    actions = whole + tl.load(whole + places.HEAD_OF_ACTIONS)
    mask_start = tl.maximum(after, prompt)
    if HAS_COMPUTED:
        mask_start = tl.maximum(mask_start, tl.load(computed_B + request))
    num_words = tl.maximum((num_actions + 63) // 64, 1)
    bit = tl.arange(0, 64)
    for word in range(0, num_words):
        a = word * 64 + bit
        in_a = a < num_actions
        rule = tl.load(actions + places.ACTION_RULE * num_actions + a, mask=in_a, other=0)
        dynamic = tl.load(actions + places.ACTION_DYNAMIC * num_actions + a, mask=in_a, other=0) != 0
        clears = tl.load(actions + places.ACTION_CLEARS * num_actions + a, mask=in_a, other=0) != 0
        lasts = tl.load(actions + places.ACTION_TOKENS * num_actions + a, mask=in_a, other=0)
        of_slot = slot * num_rules + rule
        enforced = dynamic & (tl.load(enforced_SR + of_slot, mask=in_a, other=0) != 0)
        active = tl.load(active_SR + of_slot, mask=in_a, other=0) != 0
        has_fired = bit < 0
        for row in range(first_row, end_row):
            has_fired = has_fired | (tl.load(fired + row * num_rules + rule, mask=in_a, other=0) != 0)
        stretch = slot * MASK_INTERVALS * num_actions + a
        old_from = tl.load(mask_from_SIA + stretch, mask=in_a, other=NEVER)
        old_to = tl.load(mask_to_SIA + stretch, mask=in_a, other=NEVER)
        begins = enforced & has_fired & (active | (clears == 0))
        in_force = (old_from <= mask_start) & (mask_start < old_to)
        released = enforced & clears & (active == 0) & in_force
        stop = tl.minimum(mask_start + lasts, NEVER)
        pushed_from = tl.where(begins & (in_force == 0), mask_start, old_from)
        pushed_to = tl.where(begins, stop, tl.where(released, mask_start, old_to))
        is_new = begins & (in_force == 0) & (old_from < old_to)
        in_force_next = bit < 0
        changes = in_a & (begins | released)  # never of the null slot, which is not enforced
        for number in tl.static_range(MASK_INTERVALS):
            at_number = stretch + number * num_actions
            now_from, now_to = pushed_from, pushed_to
            if number > 0:
                kept_from = tl.load(mask_from_SIA + at_number, mask=in_a, other=NEVER)
                kept_to = tl.load(mask_to_SIA + at_number, mask=in_a, other=NEVER)
                now_from = tl.where(is_new, old_from, kept_from)
                now_to = tl.where(is_new, old_to, kept_to)
                old_from, old_to = kept_from, kept_to
            tl.debug_barrier()  # no lane may write what another has yet to read
            tl.store(mask_from_SIA + at_number, now_from, mask=changes)
            tl.store(mask_to_SIA + at_number, now_to, mask=changes)
            in_force_next = in_force_next | ((now_from <= after) & (after < now_to))
            counts = in_a & dynamic & (now_from < now_to)
            mask_from = tl.minimum(mask_from, tl.min(tl.where(counts, now_from, NEVER)))
        in_force_next = in_force_next & in_a
        bits = tl.where(in_force_next, tl.full([64], 1, tl.int64) << bit.to(tl.int64), 0)
        tl.store(masked_BW + request * num_words + word, tl.sum(bits))

    # What the request's row of the report says.
    report = requests_B + request * (NUM_REQUEST_COLUMNS + num_sets)
    num_prompt = tl.full([], 0, tl.int64)
    num_output = tl.full([], 0, tl.int64)
    for row in range(first_row, end_row):
        is_seen = (tl.load(evidence + row * num_evidence) != 0).to(tl.int64)
        in_prompt = begin + (row - first_row) < prompt
        num_prompt += tl.where(in_prompt, is_seen, 0)
        num_output += tl.where(in_prompt, 0, is_seen)
    judged = (slot != 0).to(tl.int64)
    unseen = tl.load(unseen_S + slot) + (after - next_position - num_prompt - num_output)
    newest_sum = tl.load(sum_SX + slot * num_signals + newest_tokens)
    if is_any_fresh:
        newest_sum = tl.load(sums + last_row * num_signals + newest_tokens)
    tl.store(report + 0, block_key)
    tl.store(report + 1, mask_from)
    tl.store(report + 2, num_prompt)
    tl.store(report + 3, num_output)
    tl.store(report + 4, unseen * judged)
    tl.store(report + 5, judged)
    tl.store(report + 6, tl.where(num_asked > 0, after - newest_sum, 0) * judged)
    sets = whole + tl.load(whole + places.HEAD_OF_SETS)
    for n0 in range(0, num_sets, BLOCK):
        n = n0 + lane
        in_n = n < num_sets
        signal = tl.load(sets + n, mask=in_n, other=0)
        grown = tl.load(sums + last_row * num_signals + signal, mask=in_n, other=0)
        grown -= tl.load(sum_SX + slot * num_signals + signal, mask=in_n, other=0)
        tl.store(report + NUM_REQUEST_COLUMNS + n, tl.where(is_any_fresh, grown, 0), mask=in_n)
    tl.debug_barrier()

    # What the slot keeps of signals.
    if is_any_fresh:
        tl.store(unseen_S + slot, unseen)
        tl.store(next_position_S + slot, after)
        for x0 in range(0, num_signals, BLOCK):
            x = x0 + lane
            in_x = x < num_signals
            total = tl.load(sums + last_row * num_signals + x, mask=in_x, other=0)
            tl.store(sum_SX + slot * num_signals + x, total, mask=in_x)
            if window_size > 1:
                for row in range(tl.maximum(first_row, end_row - window_size), end_row):
                    place = (begin + (row - first_row)) % window_size
                    kept = tl.load(sums + row * num_signals + x, mask=in_x, other=0)
                    tl.store(
                        recent_sum_SQX + (slot * window_size + place) * num_signals + x,
                        kept,
                        mask=in_x,
                    )

    # The last program to come here sees what all wrote.
    tl.debug_barrier()
    if num_fired > 0:
        tl.atomic_add(counters, num_fired)
    ended = tl.atomic_add(counters + 1, 1)
    if ended == num_requests - 1:
        total_fired = tl.atomic_add(counters, 0)
        tl.store(num_events, total_fired)
        if total_fired > 0:
            _pack_events(
                whole,
                sums,
                values,
                fired,
                slots_B,
                position_T,
                request_T,
                prompt_tokens_S,
                enforced_SR,
                exempt_SR,
                events_V,
                values_V,
                num_rows,
                max_events,
                max_values,
                PACK_BLOCK,
            )
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def _pack_events(
    whole,
    sums,
    values,
    fired,
    slots_B,
    position_T,
    request_T,
    prompt_tokens_S,
    enforced_SR,
    exempt_SR,
    events_V,
    values_V,
    num_rows,
    max_events,
    max_values,
    BLOCK: tl.constexpr,
):
    """In the twin's order: by row and rule, those in front that act first for their request."""
    num_signals = tl.load(whole + places.HEAD_SIGNALS)
    num_conditions = tl.load(whole + places.HEAD_CONDITIONS)
    num_rules = tl.load(whole + places.HEAD_RULES)
    most = tl.load(whole + places.HEAD_RULE_CONDITIONS)
    rules = whole + tl.load(whole + places.HEAD_OF_RULES)
    of_rules = whole + tl.load(whole + places.HEAD_OF_RULE_CONDITIONS)
    lane = tl.arange(0, BLOCK)
    num_flags = num_rows * num_rules
    next_acting = tl.full([], 0, tl.int64)
    next_other = tl.full([], 0, tl.int64)
    for flag0 in range(0, num_flags, BLOCK):
        flag = flag0 + lane
        code = tl.load(fired + flag, mask=flag < num_flags, other=0, cache_modifier=".cg")
        next_other += tl.sum((code == ACTING_FIRING).to(tl.int64))
    for flag0 in range(0, num_flags, BLOCK):
        flag = flag0 + lane
        code = tl.load(fired + flag, mask=flag < num_flags, other=0, cache_modifier=".cg")
        acting = (code == ACTING_FIRING).to(tl.int64)
        other = (code == OTHER_FIRING).to(tl.int64)
        num_acting, num_other = tl.sum(acting), tl.sum(other)
        if num_acting + num_other > 0:
            place = tl.where(
                acting != 0,
                next_acting + tl.cumsum(acting, 0) - 1,
                next_other + tl.cumsum(other, 0) - 1,
            )
            used = (code != 0) & (place < max_events)
            row, rule = flag // num_rules, flag % num_rules
            request = tl.load(request_T + row, mask=used, other=0)
            position = tl.load(position_T + row, mask=used, other=0)
            slot = tl.load(slots_B + request, mask=used, other=0)
            prompt = tl.load(prompt_tokens_S + slot, mask=used, other=0)
            enforced = tl.load(enforced_SR + slot * num_rules + rule, mask=used, other=0)
            exempt = tl.load(exempt_SR + slot * num_rules + rule, mask=used, other=0)
            newest = tl.load(rules + places.RULE_NEWEST_TOKENS * num_rules + rule, mask=used, other=0)
            seen = tl.load(sums + row * num_signals + newest, mask=used, other=0, cache_modifier=".cg")
            event = events_V + place * NUM_EVENT_COLUMNS
            tl.store(event + 0, request, mask=used)
            tl.store(event + 1, rule, mask=used)
            tl.store(event + 2, position, mask=used)
            tl.store(event + 3, (position < prompt).to(tl.int64), mask=used)
            tl.store(event + 4, enforced.to(tl.int64), mask=used)
            tl.store(event + 5, position + 1 - seen, mask=used)
            tl.store(event + 6, exempt.to(tl.int64), mask=used)
            used = used & (place < max_values)
            for number in range(0, most):
                condition = tl.load(of_rules + rule * most + number, mask=used, other=-1)
                value = tl.load(
                    values + row * num_conditions + condition,
                    mask=used & (condition >= 0),
                    other=float("nan"),
                    cache_modifier=".cg",
                )
                tl.store(values_V + place * most + number, value, mask=used)
        next_acting += num_acting
        next_other += num_other
