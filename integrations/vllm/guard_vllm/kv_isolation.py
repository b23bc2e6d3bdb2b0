"""KV that was computed under a mask is never given to a request without that mask, nor the reverse.

vLLM finds a cached block by a hash over its tokens and some extra keys. A block that holds a masked
position gets one more key: which masks, where they hold from the start; which request, where they
came on in the middle.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils

from guard.program.program import Bools
from guard_vllm.compat import seam
from guard_vllm.request_facts import rules_of_request
from guard_vllm.worker import WorkerStatus

_START_ATTRIBUTE = "moe_guard_masked_from"
_KEY = "moe_guard"


class Isolation:
    """What the engine core knows of masks, applied to vLLM's block hashes."""

    def __init__(self, status: WorkerStatus) -> None:
        self._status = status
        beginning = sorted(set(status.mask_rules) - set(status.static_mask_rules))
        self._beginning = beginning

    @property
    def shares_masked(self) -> bool:
        """Whether requests under the same masks share blocks that hold masked positions."""
        return bool(self._status.static_mask_rules)

    def install(self) -> None:
        """Make vLLM's block hashes tell masks apart, for the engine core in this process."""
        stock = seam(kv_cache_utils, "generate_block_hash_extra_keys")

        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> Any:
            keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
            start = getattr(request, _START_ATTRIBUTE, None)
            if start is not None and end_token_idx > start:
                own: tuple[str, str] | None = (_KEY, request.request_id)
            else:
                own = _static_key(request, self._status, end_token_idx)
            return keys if own is None else (*(keys or ()), own), next_mm_idx

        kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys

    def isolate_from(self, request: Any, position: int) -> None:
        """Blocks of this request that end behind `position` are its own from now on.

        A block's hash is made when the block is full and its last token is known, and the verdict that
        starts a mask arrives with the token before: no masked block is hashed without the key.
        """
        if getattr(request, _START_ATTRIBUTE, None) is None:
            setattr(request, _START_ATTRIBUTE, position)

    def suspect(self, request: Any, position: int) -> None:
        """A step from `position` on was computed, of which nobody said whether it began a mask: that
        would hold from the next position on, and in the output."""
        enforced_R = _enforced(request, self._status)
        if any(enforced_R[rule] for rule in self._beginning):
            self.isolate_from(request, max(position + 1, request.num_prompt_tokens))

    def distrust(self, scheduler: Any, request: Any, position: int) -> None:
        """From `position` on this request may have been computed without the masks that its blocks are
        named after: a fault kept the guard from putting them in force.

        The hashes of a prompt are made before it is computed, and its blocks can be found as soon as
        they are scheduled. So the names are taken back, also from requests that found such a block
        already, and what these requests computed from there on becomes their own.
        """
        start = getattr(request, _START_ATTRIBUTE, None)
        is_own = start is not None and start <= position
        if is_own or _static_key(request, self._status, request.num_tokens) is None:
            return
        first = position // scheduler.hash_block_size
        tainted = list(request.block_hashes[first:])
        if tainted:
            for other in scheduler.requests.values():
                shares = len(other.block_hashes) > first and other.block_hashes[first] == tainted[0]
                if shares and (other is request or other.num_computed_tokens > position):
                    tainted += other.block_hashes[first + 1 :]
                    self._make_own(other, position, first)
            _unname(scheduler.kv_cache_manager, tainted)
        self._make_own(request, position, first)

    def _make_own(self, request: Any, position: int, first: int) -> None:
        start = getattr(request, _START_ATTRIBUTE, None)
        if start is not None and start <= position:
            return
        setattr(request, _START_ATTRIBUTE, position)
        del request.block_hashes[first:]
        request.update_block_hashes()


def _enforced(request: Any, status: WorkerStatus) -> Bools:
    """[R] the rules that act on a request."""
    return rules_of_request(request, status.revision, status.rules).enforced_R


def _unname(manager: Any, block_hashes: list[Any]) -> None:
    """Nobody finds blocks of these hashes in the prefix cache any more."""
    pool = manager.block_pool
    for block_hash in block_hashes:
        for group in range(manager.num_kv_cache_groups):
            while found := pool.get_cached_block(block_hash, [group]):
                manager.evict_blocks({block.block_id for block in found})


def _static_key(request: Any, status: WorkerStatus, end_token_idx: int) -> tuple[str, str] | None:
    """Requests under the same static masks of the same revision may share their blocks."""
    if not status.static_mask_rules:
        return None
    enforced_R = _enforced(request, status)
    in_force = [
        rule
        for rule in status.static_mask_rules
        if enforced_R[rule]
        and (status.rules[rule].phase != "output" or end_token_idx > request.num_prompt_tokens)
    ]
    if not in_force:
        return None
    key = f"{status.revision}:{','.join(map(str, in_force))}"
    if any(status.rules[rule].phase == "output" for rule in in_force):
        key += f":from {request.num_prompt_tokens}"  # equal tokens, but masked from elsewhere
    return (_KEY, key)
