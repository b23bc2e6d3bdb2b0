"""KV that was computed under a mask is never given to a request without that mask, nor the reverse.

vLLM finds a cached block by a hash over its tokens and some extra keys. A block that holds a masked
position gets one more key: which masks, where they hold from the start; which request, where they
came on in the middle.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils

from guard.program.applicability import RulesByFacts
from guard.program.program import Bools
from guard_vllm.compat import seam
from guard_vllm.request_facts import rules_of_request
from guard_vllm.worker import WorkerStatus

_START_ATTRIBUTE = "moe_guard_masked_from"
_HASHED_ATTRIBUTE = "moe_guard_hashed_under"
_KEY = "moe_guard"


class Isolation:
    """What the engine core knows of masks, applied to vLLM's block hashes."""

    def __init__(self, status: WorkerStatus) -> None:
        self._masks = _Masks(status)
        self._before: _Masks | None = None  # of steps that were under way when policies changed

    def follow(self, status: WorkerStatus, scheduler: Any) -> None:
        """Other policies are in force, from the next position of each request on.

        The blocks of a request that has computed none are named anew. Where the rules of its static
        masks changed on the way, its blocks are its own: workers go by rules, and may compute again
        without a mask what was computed under it.
        """
        self._before, self._masks = self._masks, _Masks(status)
        for request in scheduler.requests.values():
            old, new = self._before.in_force(request), self._masks.in_force(request)
            same_rules = self._before.static_rules(request) == self._masks.static_rules(request)
            if old == new and same_rules:
                continue
            if not (
                request.num_computed_tokens or request.num_output_tokens or request.num_preemptions
            ):
                self.hash_anew(request)
                continue
            self._make_own(request, 0, 0)

    def hash_anew(self, request: Any) -> None:
        """Name the blocks of a request that has computed none."""
        if hasattr(request, _HASHED_ATTRIBUTE):
            delattr(request, _HASHED_ATTRIBUTE)
        request.block_hashes.clear()
        request.update_block_hashes()

    def admit(self, request: Any) -> None:
        """vLLM hashes a prompt as it comes in, in another thread: policies may have changed since."""
        hashed_under = getattr(request, _HASHED_ATTRIBUTE, self._masks)
        if hashed_under is not self._masks:
            self.hash_anew(request)

    @property
    def shares_masked(self) -> bool:
        """Whether requests under the same masks share blocks that hold masked positions."""
        return any(masks.static for masks in self._known())

    def _known(self) -> list[_Masks]:
        return [masks for masks in (self._masks, self._before) if masks is not None]

    def install(self) -> None:
        """Make vLLM's block hashes tell masks apart, for the engine core in this process."""
        stock = seam(kv_cache_utils, "generate_block_hash_extra_keys")

        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> Any:
            keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
            masks = self._masks
            if not hasattr(request, _HASHED_ATTRIBUTE):
                setattr(request, _HASHED_ATTRIBUTE, masks)
            start = getattr(request, _START_ATTRIBUTE, None)
            if start is not None and end_token_idx > start:
                own: tuple[str, str] | None = (_KEY, request.request_id)
            else:
                own = masks.key(request, end_token_idx)
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
        if any(masks.may_begin(request) for masks in self._known()):
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
        if is_own or not any(masks.key(request, request.num_tokens) for masks in self._known()):
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


class _Masks:
    """The masks of one revision. Static ones are told apart by what they do, not by their revision:
    requests under equal ones share their blocks across reloads.

    static: of each static mask its rule, what it does, and whether it holds in the output alone
    """

    def __init__(self, status: WorkerStatus) -> None:
        self._status = status
        self._rules_by_facts = RulesByFacts(status.rules)
        key_of = dict(zip(status.mask_rules, status.mask_keys, strict=True))
        self.static = [
            (rule, key_of[rule], status.rules[rule].phase == "output")
            for rule in status.static_mask_rules
        ]
        self._beginning = sorted(set(status.mask_rules) - set(status.static_mask_rules))

    def may_begin(self, request: Any) -> bool:
        """Some mask that is not static acts on a request, if its rule fires."""
        enforced_R = self._enforced(request)
        return any(enforced_R[rule] for rule in self._beginning)

    def in_force(self, request: Any) -> frozenset[tuple[str, bool]]:
        """The static masks of a request."""
        if not self.static:
            return frozenset()
        enforced_R = self._enforced(request)
        return frozenset((key, in_output) for rule, key, in_output in self.static if enforced_R[rule])

    def static_rules(self, request: Any) -> frozenset[str]:
        """The keys of the rules whose static masks act on a request."""
        if not self.static:
            return frozenset()
        enforced_R = self._enforced(request)
        return frozenset(self._status.rules[rule].key for rule, _, _ in self.static if enforced_R[rule])

    def key(self, request: Any, end_token_idx: int) -> tuple[str, str] | None:
        """Of a block that ends there; None where it holds no masked position."""
        in_force = [
            (key, in_output)
            for key, in_output in self.in_force(request)
            if not in_output or end_token_idx > request.num_prompt_tokens
        ]
        if not in_force:
            return None
        everywhere = ",".join(sorted(key for key, in_output in in_force if not in_output))
        in_output = ",".join(sorted(key for key, in_output in in_force if in_output))
        if in_output:  # equal tokens, but masked from elsewhere
            return (_KEY, f"{everywhere};{in_output} from {request.num_prompt_tokens}")
        return (_KEY, everywhere)

    def _enforced(self, request: Any) -> Bools:
        """[R] the rules that act on a request."""
        return rules_of_request(request, self._status.revision, self._rules_by_facts).enforced_R


def _unname(manager: Any, block_hashes: list[Any]) -> None:
    """Nobody finds blocks of these hashes in the prefix cache any more."""
    pool = manager.block_pool
    for block_hash in block_hashes:
        for group in range(manager.num_kv_cache_groups):
            while found := pool.get_cached_block(block_hash, [group]):
                manager.evict_blocks({block.block_id for block in found})
