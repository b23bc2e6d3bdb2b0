"""Evidence of prefixes that vLLM takes from its cache: the worker's half.

vLLM's KV blocks are named by numbers, and the guard keeps what it saw of a token under the same number
and offset. The engine core says in each step which blocks its pool handed out (`kv_blocks.py`): what
they held before is forgotten. So a prefix that is found in the cache has the evidence of the steps that
computed it, and none where nobody saw them: a failed step, a reload, KV that a connector brought.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from guard.device.kept_evidence import KeptEvidence
from guard.runtime import Guard
from guard_vllm.compat import seam

NEWS_ATTRIBUTE = "moe_guard_kv_blocks"
"""Of a scheduler output, which travels to every worker."""

_NOT_ALL_TOKENS = ("RSWASpec", "HiddenStateCacheSpec")
"""Kinds of full attention whose blocks are freed, or hold something other than tokens' KV."""


class BlockNews(NamedTuple):
    """serial: 1, 2, 3 …; a worker that misses one no longer knows what its blocks hold
    handed_out: blocks that the pool gave away since the last news
    """

    serial: int
    handed_out: tuple[int, ...]


class KeptGroup(NamedTuple):
    """The KV cache group whose blocks carry the evidence."""

    group: int
    num_blocks: int
    block_size: int


def kept_group(kv_cache_config: Any) -> KeptGroup | None:
    """The first group that holds every token of a request, or None: sliding windows and state-space
    layers free or skip blocks."""
    for group, spec in enumerate(kv_cache_config.kv_cache_groups):
        if holds_all_tokens(spec.kv_cache_spec):
            return KeptGroup(group, kv_cache_config.num_blocks, spec.kv_cache_spec.block_size)
    return None


def holds_all_tokens(spec: Any) -> bool:
    full_attention = seam("vllm.v1.kv_cache_interface", "FullAttentionSpec")
    of_layers = getattr(spec, "kv_cache_specs", None)
    layers = [spec] if of_layers is None else list(of_layers.values())
    return all(
        isinstance(layer, full_attention) and type(layer).__name__ not in _NOT_ALL_TOKENS
        for layer in layers
    )


def memory_share(kv_cache_specs: dict[str, Any], token_bytes: int) -> float:
    """Of the memory that vLLM has found for KV, the part that the evidence needs.

    Layers of one kind share a block table, and kinds share memory: the smallest kind bounds from
    below what a block of KV takes.
    """
    kinds: dict[Any, float] = {}
    for spec in kv_cache_specs.values():
        kinds[spec] = kinds.get(spec, 0) + spec.page_size_bytes
    kept = [spec for spec in kinds if holds_all_tokens(spec)]
    if not kept:
        return 0.0
    evidence = float(max(spec.block_size for spec in kept) * token_bytes)
    return evidence / (min(kinds.values()) + evidence)


class PrefixEvidence:
    """Tells one worker's guard, before each step, what vLLM did with its KV blocks."""

    def __init__(self, guard: Guard, kept: KeptEvidence, group: int) -> None:
        self.group = group
        self._guard = guard
        self._kept = kept
        self._serial = 0

    def passes(self, scheduler_output: Any) -> bool:
        """Take a step in which vLLM did nothing with its blocks but fill them, as in most. False: this
        is no such step, and nothing is taken."""
        news: BlockNews | None = getattr(scheduler_output, NEWS_ATTRIBUTE, None)
        if (
            news is None
            or news.serial != self._serial + 1
            or news.handed_out
            or scheduler_output.scheduled_new_reqs
            or scheduler_output.scheduled_cached_reqs.resumed_req_ids
            or getattr(scheduler_output, "kv_cache_block_copies", None)
        ):
            return False
        self._serial = news.serial
        return True

    def admit(self, scheduler_output: Any) -> None:
        news: BlockNews | None = getattr(scheduler_output, NEWS_ATTRIBUTE, None)
        if news is None or news.serial != self._serial + 1:
            self.lose_track()
        if news is not None:
            self._serial = news.serial
        if not self._guard.judges:
            return  # nothing is written, and what a later program counts was not seen by an earlier one
        if news is not None and news.handed_out:
            self._kept.forget(news.handed_out)
        if copies := getattr(scheduler_output, "kv_cache_block_copies", None):
            self._kept.copy([src for src, _ in copies], [dst for _, dst in copies])
        for request in scheduler_output.scheduled_new_reqs:
            self._take(request.req_id, request.block_ids, request.num_computed_tokens)
        resumed = scheduler_output.scheduled_cached_reqs
        if resumed.resumed_req_ids:
            for req_id, block_ids, num_computed_tokens in zip(
                resumed.req_ids, resumed.new_block_ids, resumed.num_computed_tokens, strict=True
            ):
                if req_id in resumed.resumed_req_ids:
                    self._take(req_id, block_ids, num_computed_tokens)

    def lose_track(self) -> None:
        """It is no longer known what the blocks hold, so nothing of it counts as seen."""
        self._kept.forget_all()

    def _take(self, req_id: str, block_ids: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens:
            self._guard.take_from_cache(req_id, block_ids[self.group], num_computed_tokens)
