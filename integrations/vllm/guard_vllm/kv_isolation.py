"""KV that was computed under a mask is never given to a request without that mask, nor the reverse.

vLLM finds a cached block by a hash over its tokens and some extra keys. A block that holds a masked
position gets one more key: which masks, where they hold from the start; which request, where they
came on in the middle.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils

from guard_vllm.compat import seam
from guard_vllm.steps import enforced_policies
from guard_vllm.worker import WorkerStatus

_START_ATTRIBUTE = "moe_guard_masked_from"
_KEY = "moe_guard"


def isolate_from(request: Any, position: int) -> None:
    """Blocks of this request that end behind `position` are its own from now on.

    A block's hash is made when the block is full and its last token is known, and the verdict that
    starts a mask arrives with the token before: no masked block is hashed without the key.
    """
    if getattr(request, _START_ATTRIBUTE, None) is None:
        setattr(request, _START_ATTRIBUTE, position)


def install(status: WorkerStatus) -> None:
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
            own = _static_key(request, status, end_token_idx)
        return keys if own is None else (*(keys or ()), own), next_mm_idx

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys


def _static_key(request: Any, status: WorkerStatus, end_token_idx: int) -> tuple[str, str] | None:
    """Requests under the same static masks of the same revision may share their blocks."""
    if not status.static_mask_rules:
        return None
    named = enforced_policies(request.sampling_params)
    in_force = [
        rule
        for rule in status.static_mask_rules
        if (status.rules[rule].mode == "enforce" or status.rules[rule].policy in named)
        and (status.rules[rule].phase != "output" or end_token_idx > request.num_prompt_tokens)
    ]
    if not in_force:
        return None
    key = f"{status.revision}:{','.join(map(str, in_force))}"
    if any(status.rules[rule].phase == "output" for rule in in_force):
        key += f":from {request.num_prompt_tokens}"  # equal tokens, but masked from elsewhere
    return (_KEY, key)
