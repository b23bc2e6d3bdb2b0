"""A step's decisions, request by request and row by row. Plain Python that numba compiles.

Requests share nothing, and what a row sees of earlier ones is in its slot: sums, rings of recent sums,
the rule's last result. So each row costs the rules that apply to its request and are in their phase.
Float64 arithmetic is in the twin's order; no compiler may fuse or reorder it. Inner loops take no
views of arrays: numba counts references to a view, atomically.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.device.kernels.numba_judge.compiled import inlined

_FALSE, _UNKNOWN, _TRUE = 0, 1, 2
_NEVER = 2**62
_REQUEST, _PROMPT, _OUTPUT = 1, 2, 3  # `WindowKind`; else recent
_LOGISTIC, _NEGATIVE_LOG = 1, 2  # `Transform`
_NUM_REQUEST_COLUMNS = 7
_NUM_EVENT_COLUMNS = 7


@inlined
def _reading(
    reading: Any,
    readings: Any,
    position: Any,
    prompt: Any,
    begin: Any,
    following: Any,
    signal_X: Any,
    total_X: Any,
    before_X: Any,
    prompt_X: Any,
    recent_QX: Any,
) -> Any:
    """One signal summed over a window that ends at a row, as `WindowReader` does."""
    signal, window, tokens = readings[reading, 0], readings[reading, 1], readings[reading, 2]
    value = total_X[signal]
    if window == _REQUEST:
        return value
    if window == _PROMPT:
        return prompt_X[signal] if position >= prompt - 1 else 0
    if window == _OUTPUT:
        return value - prompt_X[signal] if position >= prompt else 0
    start = position - tokens
    if readings[reading, 3] and start < prompt:
        return value - prompt_X[signal]
    if start >= begin:
        return signal_X[signal] if tokens == 1 else value - recent_QX[start % len(recent_QX), signal]
    if max(start, -1) >= following - 1:
        return value - before_X[signal]
    return value - recent_QX[start % len(recent_QX), signal] if start >= 0 else value


@inlined
def _compare(
    conditions_here: Any,
    conditions: Any,
    real: Any,
    value_M: Any,
    truth: Any,
    value_C: Any,
    extreme_C: Any,
) -> None:
    """`ConditionEvaluator.evaluate` for some conditions of one row, and their extremes."""
    for here in range(len(conditions_here)):
        at = conditions_here[here]
        tokens = value_M[conditions[at, 1]]
        denominator = tokens * real[at, 1] + real[at, 2]
        if conditions[at, 2] >= 0:
            denominator = np.float64(value_M[conditions[at, 2]])
        sign, value, held = real[at, 6], np.nan, _UNKNOWN
        if conditions[at, 6]:
            value, held = 1.0, _TRUE
        elif tokens >= conditions[at, 3] and denominator > 0:
            quotient = (value_M[conditions[at, 0]] + real[at, 0]) / denominator
            if conditions[at, 4] == _NEGATIVE_LOG:
                quotient = -np.log(quotient)
            signed = quotient * sign
            if conditions[at, 5]:
                held = _TRUE if signed > real[at, 4] else _FALSE
            else:
                held = _TRUE if signed >= real[at, 5] else _FALSE
            value = quotient + real[at, 3]
            if conditions[at, 4] == _LOGISTIC:
                value = 1.0 / (1.0 + np.exp(-value))
        truth[1 + at] = held
        value_C[at] = value
        signed = value * sign
        extreme = extreme_C[at]
        # Neither what is unknown counts nor what is infinitely far on the other side.
        if signed > -np.inf and not signed <= extreme * sign:
            extreme_C[at] = signed * sign


@inlined
def _node(node: Any, nodes: Any, truth: Any) -> Any:
    """The least of its children, see `ExpressionTable`."""
    least = _TRUE
    for nth in range(nodes.shape[1]):
        packed = nodes[node, nth]
        value = truth[packed >> 1]
        if packed & 1:
            value = _TRUE - value
        least = min(least, value)
    return least


@inlined
def _masks(
    start: Any,
    actions: Any,
    enforced_R: Any,
    active_R: Any,
    num_fired_R: Any,
    from_IA: Any,
    to_IA: Any,
) -> None:
    """`MaskSchedule.update` for one request."""
    for action in range(actions.shape[1]):
        rule = actions[0, action]
        if not enforced_R[rule] or not actions[1, action]:
            continue
        clears = actions[2, action] != 0
        begins = num_fired_R[rule] > 0 and (active_R[rule] or not clears)
        was_from, was_to = from_IA[0, action], to_IA[0, action]
        in_force = was_from <= start and start < was_to
        if begins:
            if not in_force:
                if was_from < was_to:
                    for place in range(len(from_IA) - 1, 0, -1):
                        from_IA[place, action] = from_IA[place - 1, action]
                        to_IA[place, action] = to_IA[place - 1, action]
                from_IA[0, action] = start
            tokens = actions[3, action]
            to_IA[0, action] = min(start + tokens, _NEVER)
        elif clears and not active_R[rule] and in_force:
            to_IA[0, action] = start


def decide(
    evidence_TX: Any,
    slots_B: Any,
    query_start_B1: Any,
    position_T: Any,
    rejected_B: Any,
    computed_B: Any,
    signals: Any,
    readings: Any,
    conditions: Any,
    real: Any,
    rules: Any,
    conditions_RC: Any,
    node_start_R1: Any,
    node_N: Any,
    nodes: Any,
    actions: Any,
    set_signal_N: Any,
    next_position_S: Any,
    prompt_tokens_S: Any,
    unseen_S: Any,
    sum_SX: Any,
    prompt_sum_SX: Any,
    recent_sum_SQX: Any,
    hits_SR: Any,
    recent_hits_SHR: Any,
    active_SR: Any,
    applies_SR: Any,
    enforced_SR: Any,
    exempt_SR: Any,
    mask_from_SIA: Any,
    mask_to_SIA: Any,
    block_at_SR: Any,
    extreme_SC: Any,
    requests_BF: Any,
    masked_BW: Any,
    extremes_BC: Any,
) -> Any:
    """Advance the slots, write the last three, and return the events and their values in order.

    rejected_B, computed_B: int64 [B], or [0] where there are none
    The tables are those of `DecisionTables`, the state that of `SlotState`.
    """
    num_signals, num_conditions, num_rules = sum_SX.shape[1], extreme_SC.shape[1], hits_SR.shape[1]
    most_conditions = conditions_RC.shape[1]
    persists = recent_hits_SHR.shape[1] > 1
    kept_sums, kept_hits = recent_sum_SQX.shape[1], recent_hits_SHR.shape[1]
    signal_X = np.zeros(num_signals, dtype=np.int64)
    before_X = np.zeros(num_signals, dtype=np.int64)
    hits_before_R = np.zeros(num_rules, dtype=np.int64)
    num_fired_R = np.zeros(num_rules, dtype=np.int64)
    rules_here = np.zeros(num_rules, dtype=np.int64)
    rules_now = np.zeros(num_rules, dtype=np.int64)
    conditions_now = np.zeros(num_conditions, dtype=np.int64)
    row_M = np.full(len(readings), -1, dtype=np.int64)
    value_M = np.zeros(len(readings), dtype=np.int64)
    value_C = np.zeros(num_conditions, dtype=np.float64)
    truth = np.full(1 + num_conditions + len(nodes), _TRUE, dtype=np.int64)
    events = np.empty((8, _NUM_EVENT_COLUMNS), dtype=np.int64)
    values = np.empty((8, most_conditions), dtype=np.float64)
    acting = np.empty(8, dtype=np.bool_)
    num_events = 0
    for request in range(len(slots_B)):
        slot = slots_B[request]
        requests_BF[request] = 0
        masked_BW[request] = 0
        requests_BF[request, 0] = _NEVER
        requests_BF[request, 1] = _NEVER
        if slot == 0:
            extremes_BC[request] = np.nan
            continue
        start_row = query_start_B1[request]
        last_row = query_start_B1[request + 1] - 1
        if len(rejected_B):
            last_row -= rejected_B[request]
        following, prompt = next_position_S[slot], prompt_tokens_S[slot]
        begin = max(following, position_T[start_row])
        after = max(following, position_T[last_row] + 1)
        first_row = start_row + begin - position_T[start_row]
        total_X, prompt_X, recent_QX = sum_SX[slot], prompt_sum_SX[slot], recent_sum_SQX[slot]
        hits_R, recent_HR = hits_SR[slot], recent_hits_SHR[slot]
        active_R, enforced_R = active_SR[slot], enforced_SR[slot]
        before_X[:] = total_X
        if persists:
            hits_before_R[:] = hits_R
        num_fired_R[:] = 0
        num_here, newest = 0, np.int64(0)
        for rule in range(num_rules):
            if applies_SR[slot, rule]:
                rules_here[num_here] = rule
                num_here += 1
                newest = max(newest, rules[8, rule])
        prompt_tokens, output_tokens = 0, 0
        for row in range(first_row, last_row + 1):
            position = position_T[row]
            for signal in range(num_signals):
                value = evidence_TX[row, signals[0, signal]]
                if signals[0, signal] != signal:  # an indicator
                    value = (value >= signals[2, signal]) * evidence_TX[row, signals[1, signal]]
                signal_X[signal] = value
                total_X[signal] += value
            if position == prompt - 1:
                prompt_X[:] = total_X
            judged = evidence_TX[row, 0] != 0
            in_prompt = position < prompt
            if judged:
                if in_prompt:
                    prompt_tokens += 1
                else:
                    output_tokens += 1
            num_now, num_conditions_now = 0, 0
            for here in range(num_here if judged else 0):
                rule = rules_here[here]
                if rules[1 if in_prompt else 2, rule] == 0 or signal_X[rules[7, rule]] == 0:
                    continue
                rules_now[num_now] = rule
                num_now += 1
                for nth in range(most_conditions):
                    at = conditions_RC[rule, nth]
                    if at < 0:
                        continue
                    conditions_now[num_conditions_now] = at
                    num_conditions_now += 1
                    for nth_reading in range(3):
                        reading = conditions[at, nth_reading]
                        if reading >= 0 and row_M[reading] != row:
                            row_M[reading] = row
                            value_M[reading] = _reading(
                                reading,
                                readings,
                                position,
                                prompt,
                                begin,
                                following,
                                signal_X,
                                total_X,
                                before_X,
                                prompt_X,
                                recent_QX,
                            )
            _compare(
                conditions_now[:num_conditions_now],
                conditions,
                real,
                value_M,
                truth,
                value_C,
                extreme_SC[slot],
            )
            for now in range(num_now):
                rule = rules_now[now]
                for nth in range(node_start_R1[rule], node_start_R1[rule + 1]):
                    column = node_N[nth]
                    truth[column] = _node(column - 1 - num_conditions, nodes, truth)
                root = rules[0, rule]
                holds = truth[root >> 1] == (_FALSE if root & 1 else _TRUE)
                if persists:
                    hits_R[rule] += holds
                    start = max(position - rules[4, rule], -1)
                    earlier = np.int64(0)
                    if start < begin and start >= following - 1:
                        earlier = hits_before_R[rule]
                    elif start >= 0:
                        earlier = recent_HR[start % kept_hits, rule]
                    holds = hits_R[rule] - earlier >= rules[3, rule]
                fires = holds and not active_R[rule]
                active_R[rule] = holds
                if not fires:
                    continue
                num_fired_R[rule] += 1
                if rules[5, rule] and enforced_R[rule]:
                    acts_at = max(position, prompt - 1)
                    block_at_SR[slot, rule] = min(block_at_SR[slot, rule], acts_at)
                if num_events == len(events):
                    more_events = np.empty((2 * num_events, _NUM_EVENT_COLUMNS), dtype=np.int64)
                    more_values = np.empty((2 * num_events, most_conditions), dtype=np.float64)
                    more_acting = np.empty(2 * num_events, dtype=np.bool_)
                    more_events[:num_events] = events
                    more_values[:num_events] = values
                    more_acting[:num_events] = acting
                    events, values, acting = more_events, more_values, more_acting
                events[num_events, 0] = request
                events[num_events, 1] = rule
                events[num_events, 2] = position
                events[num_events, 3] = in_prompt
                events[num_events, 4] = enforced_R[rule]
                events[num_events, 5] = position + 1 - total_X[rules[8, rule]]
                events[num_events, 6] = exempt_SR[slot, rule]
                for nth in range(most_conditions):
                    at = conditions_RC[rule, nth]
                    values[num_events, nth] = value_C[at] if at >= 0 else np.nan
                acting[num_events] = rules[6, rule] != 0 and enforced_R[rule] and num_fired_R[rule] == 1
                num_events += 1
            if kept_sums > 1:
                recent_QX[position % kept_sums] = total_X
            if persists:
                recent_HR[position % kept_hits] = hits_R
        unseen_S[slot] += after - following - prompt_tokens - output_tokens
        next_position_S[slot] = after
        num_actions = actions.shape[1]
        from_IA, to_IA = mask_from_SIA[slot], mask_to_SIA[slot]
        if num_actions:
            begins_at = max(after, prompt)
            if len(computed_B):
                begins_at = max(begins_at, computed_B[request])
            _masks(begins_at, actions, enforced_R, active_R, num_fired_R, from_IA, to_IA)
        for action in range(num_actions):
            in_force = False
            for place in range(len(from_IA)):
                first, stop = from_IA[place, action], to_IA[place, action]
                if first < stop and actions[1, action]:
                    requests_BF[request, 1] = min(requests_BF[request, 1], first)
                in_force = in_force or (first <= after and after < stop)
            if in_force:
                masked_BW[request, action >> 6] |= np.int64(1) << np.int64(action & 63)
        for rule in range(num_rules):
            if rules[5, rule] and block_at_SR[slot, rule] < _NEVER:
                block_at = block_at_SR[slot, rule]
                key = block_at * num_rules + rule
                requests_BF[request, 0] = min(requests_BF[request, 0], key)
        requests_BF[request, 2] = prompt_tokens
        requests_BF[request, 3] = output_tokens
        requests_BF[request, 4] = unseen_S[slot]
        requests_BF[request, 5] = 1
        requests_BF[request, 6] = after - total_X[newest] if num_here else 0
        for nth in range(len(set_signal_N)):
            signal = set_signal_N[nth]
            requests_BF[request, _NUM_REQUEST_COLUMNS + nth] = total_X[signal] - before_X[signal]
        for at in range(num_conditions):
            extremes_BC[request, at] = extreme_SC[slot, at]
    # In front the first firing of each request and rule that acts; the others behind, in their order.
    ordered_events = np.empty((num_events, _NUM_EVENT_COLUMNS), dtype=np.int64)
    ordered_values = np.empty((num_events, most_conditions), dtype=np.float64)
    place = 0
    for wanted in (True, False):
        for event in range(num_events):
            if acting[event] == wanted:
                ordered_events[place] = events[event]
                ordered_values[place] = values[event]
                place += 1
    return ordered_events, ordered_values
