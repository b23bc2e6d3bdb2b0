# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Mask and tap of a MoE layer: one program a row. What it computes is in `guard/device/routing.py`.

A row under no mask costs a look at its bits and the copy into the tap. Letters as in `layout`; lanes
are experts (BLOCK_E), places among the k (BLOCK_K) or groups (BLOCK_G), each a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SOFTPLUS_IS_EXP_BELOW = tl.constexpr(-20.0)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_LOWEST_KEY = tl.constexpr(-(1 << 62))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1]: what rounding 1 + x loses is put back (Kahan's way)."""
    u = 1.0 + x
    lost = u - 1.0
    safe = tl.where(lost == 0.0, 1.0, lost)
    return tl.where(lost == 0.0, x, tl.log(u) * (x / safe))


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _softmax(log_weight, used):
    """Over the lanes used; 0 everywhere where all of them are minus infinity."""
    largest = tl.max(tl.where(used, log_weight, float("-inf")))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.where(used, tl.exp(tl.where(used, log_weight, float("-inf")) - largest), 0.0)
    total = tl.sum(weight)
    return weight / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _ordered(value):
    """int64 in the order of the floats: the bits of a negative one count backwards."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit(do_not_specialize=range(16))  # all but the sizes that are compiled in
def route_kernel(
    router_logits,
    topk_weights,
    topk_ids,
    row_bits_TW,
    expert_bits_EW,
    method_bits_MW,
    tap_ids_TK,
    tap_weights_TK,
    bias,
    logit_stride,
    weight_stride,
    id_stride,
    tap_stride,
    bias_stride,
    num_words,
    scaling,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_MASKING: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """expert_bits_EW, tap_ids_TK, tap_weights_TK: from this layer's first number on"""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_K)
    used = place < TOP_K
    ids = tl.load(topk_ids + row * id_stride + place, mask=used, other=-1)
    weights = tl.load(topk_weights + row * weight_stride + place, mask=used, other=0.0)
    gates = weights / scaling
    if IS_MASKING:
        any_bits = tl.zeros((), dtype=tl.int64)
        for word in range(num_words):
            any_bits |= tl.load(row_bits_TW + row * num_words + word)
        if any_bits != 0:
            lane = tl.arange(0, BLOCK_E)
            real = lane < NUM_EXPERTS
            rerouted = tl.zeros((BLOCK_E,), dtype=tl.int64)
            renormed = tl.zeros((BLOCK_E,), dtype=tl.int64)
            dropped = tl.zeros((BLOCK_E,), dtype=tl.int64)
            forced = tl.zeros((BLOCK_E,), dtype=tl.int64)
            for word in range(num_words):
                in_force = tl.load(row_bits_TW + row * num_words + word)
                hits = tl.load(expert_bits_EW + lane * num_words + word, mask=real, other=0) & in_force
                rerouted |= hits & tl.load(method_bits_MW + word)
                renormed |= hits & tl.load(method_bits_MW + num_words + word)
                dropped |= hits & tl.load(method_bits_MW + 2 * num_words + word)
                forced |= hits & tl.load(method_bits_MW + 3 * num_words + word)
            is_rerouted = rerouted != 0
            is_renormed = (renormed != 0) & (rerouted == 0)
            is_dropped = (dropped != 0) & ((rerouted | renormed) == 0)
            is_forced = (forced != 0) & ((rerouted | renormed | dropped) == 0)
            asked = is_rerouted | is_renormed | is_dropped | is_forced
            if tl.max(asked.to(tl.int32)) != 0:
                logits = tl.load(router_logits + row * logit_stride + lane, mask=real, other=0.0)
                logits = logits.to(tl.float32)
                logits = tl.where(logits != logits, float("-inf"), tl.minimum(logits, _FLOAT_MAX))
                logits = tl.where(real, logits, float("-inf"))
                choice = logits
                if HAS_BIAS:
                    if SCORING == 0:
                        choice = _softmax(logits, real)
                    elif SCORING == 1:
                        choice = _sigmoid(logits)
                    else:
                        choice = tl.sqrt(_softplus(logits))
                    biases = tl.load(bias + row * bias_stride + lane, mask=real, other=0.0)
                    choice = choice + biases
                tier = (~is_rerouted).to(tl.int64) + 2 * is_forced.to(tl.int64)
                if NUM_GROUPS > 1:
                    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
                    live = choice
                    if HAS_BIAS:
                        lowest = tl.min(tl.where(real, biases, float("inf"))) - 1.0
                        live = tl.where(is_rerouted, lowest, choice)
                    else:
                        live = tl.where(is_rerouted, float("-inf"), choice)
                    group = tl.arange(0, BLOCK_G)
                    score = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
                    for nth in range(NUM_GROUPS):
                        own = tl.where(real & (lane // size == nth), live, float("-inf"))
                        best = tl.max(own)
                        if HAS_BIAS:
                            own = tl.where(lane == tl.argmax(own, axis=0), float("-inf"), own)
                            best += tl.max(own)
                        score = tl.where(group == nth, best, score)
                    order = tl.where(group < NUM_GROUPS, _ordered(score), _LOWEST_KEY)
                    in_kept = tl.zeros((BLOCK_E,), dtype=tl.int1)
                    for _ in range(TOPK_GROUPS):
                        best_group = tl.argmax(order, axis=0)
                        in_kept = in_kept | (lane // size == best_group)
                        order = tl.where(group == best_group, _LOWEST_KEY, order)
                    tier = 2 * tier + (in_kept & ~is_rerouted).to(tl.int64)
                key = tl.where(real, _ordered(choice) + tier * (1 << 33), _LOWEST_KEY)
                if SCORING == 0:
                    if RENORMALIZE:
                        log_score = logits
                    else:
                        largest = tl.max(logits)
                        largest = tl.where(largest == float("-inf"), 0.0, largest)
                        total = tl.sum(tl.exp(logits - largest))
                        log_score = logits - (largest + tl.log(tl.where(total == 0.0, 1.0, total)))
                elif SCORING == 1:
                    log_score = tl.minimum(logits, 0.0) - _log1p(tl.exp(-tl.abs(logits)))
                else:
                    is_exp = logits < _SOFTPLUS_IS_EXP_BELOW
                    log_score = 0.5 * tl.where(
                        is_exp, logits, tl.log(_softplus(tl.where(is_exp, 0.0, logits)))
                    )
                log_score = tl.where(is_rerouted, float("-inf"), log_score)
                own_ids = tl.full((BLOCK_K,), -1, dtype=tl.int32)
                log_weight = tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32)
                cut = tl.zeros((BLOCK_K,), dtype=tl.int32)  # 1: dropped, 2: dropped and handed on
                for nth in range(TOP_K):
                    best_lane = tl.argmax(key, axis=0)
                    is_best = lane == best_lane
                    is_nth = place == nth
                    own_ids = tl.where(is_nth, best_lane, own_ids)
                    best_log = tl.max(tl.where(is_best, log_score, float("-inf")))
                    log_weight = tl.where(is_nth, best_log, log_weight)
                    how = tl.where(is_renormed, 2, tl.where(is_dropped, 1, 0))
                    cut = tl.where(is_nth, tl.max(tl.where(is_best, how, 0)), cut)
                    key = tl.where(is_best, _LOWEST_KEY, key)
                if RENORMALIZE:
                    own_gates = _softmax(log_weight, used)
                else:
                    own_gates = tl.where(used, tl.exp(log_weight), 0.0)
                own_gates = tl.where(cut == 1, 0.0, own_gates)
                if tl.max(cut) == 2:
                    left = _softmax(tl.where(cut == 0, log_weight, float("-inf")), used)
                    own_gates = left * tl.sum(own_gates)
                replaces = used & (ids >= 0)  # a padding row chooses nobody
                gates = tl.where(replaces, own_gates, gates)
                ids = tl.where(replaces, own_ids.to(ids.dtype), ids)
                tl.store(topk_ids + row * id_stride + place, ids, mask=replaces)
                tl.store(topk_weights + row * weight_stride + place, own_gates * scaling, mask=replaces)
    tl.store(tap_ids_TK + row * tap_stride + place, ids.to(tl.int32), mask=used)
    tl.store(tap_weights_TK + row * tap_stride + place, gates, mask=used)
