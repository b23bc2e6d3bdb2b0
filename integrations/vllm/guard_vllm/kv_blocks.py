"""Evidence of prefixes that vLLM takes from its cache: the engine core's half.

The workers hear which blocks were handed out. For requests that must not go unjudged, the engine core
also keeps a list of its own: the cached blocks of which every token was seen, as reported by the step
that computed them. Such a request takes no other block from the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from guard.failures import Failures, Stage
from guard.program.step_report import PackedReport, StepReport
from guard_vllm.prefix_evidence import NEWS_ATTRIBUTE, BlockNews, KeptGroup
from guard_vllm.steps import wrap


class _Registered(NamedTuple):
    """A block that vLLM made findable in the step that computes its last token."""

    req_id: str
    start: int
    stop: int


def step_starts(scheduler_output: Any) -> dict[str, int]:
    """The first position that a step computes, of each request in it."""
    cached = scheduler_output.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request in scheduler_output.scheduled_new_reqs:
        starts[request.req_id] = request.num_computed_tokens
    return starts


class KVBlocks:
    """Hangs on one scheduler and its block pool.

    must_be_seen: whether a request may take only blocks whose evidence was confirmed; None while no
        policy asks for that
    notes_steps: there is something to `note_step` for
    """

    def __init__(
        self,
        scheduler: Any,
        kept: KeptGroup,
        failures: Failures,
        must_be_seen: Callable[[Any], bool] | None,
    ) -> None:
        self._failures = failures
        self._group, self._block_size = kept.group, kept.block_size
        self._serial = 0
        self._handed_out: list[int] = []
        self._must_be_seen = must_be_seen
        self.notes_steps = must_be_seen is not None
        self._registering: dict[int, _Registered] = {}
        self._in_flight: dict[int, dict[int, _Registered]] = {}  # by serial of the step
        self._confirmed: set[int] = set()
        self._holes: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self._requests = scheduler.requests
        self._manager = scheduler.kv_cache_manager
        pool = self._manager.block_pool
        wrap(pool, "get_new_blocks", self._get_new_blocks)
        wrap(scheduler, "schedule", self._schedule)
        wrap(pool, "cache_full_blocks", self._cache_full_blocks)
        wrap(self._manager, "get_computed_blocks", self._get_computed_blocks)

    def must_be_seen(
        self, must_be_seen: Callable[[Any], bool] | None, computed: Mapping[str, int]
    ) -> None:
        """Other policies are in force: what was computed before counts as seen by nobody.

        computed: of each request under way, the positions that were
        """
        self._must_be_seen = must_be_seen
        self.notes_steps = must_be_seen is not None
        self._confirmed.clear()
        self._registering.clear()
        self._in_flight.clear()
        self._holes.clear()
        if must_be_seen is not None:
            for req_id, num_tokens in computed.items():
                self._holes[req_id].append((0, num_tokens))

    def _get_new_blocks(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = stock(*args, **kwargs)
        with self._failures.caught(Stage.LEDGER) as attempt:
            block_ids = [block.block_id for block in blocks]
            self._handed_out.extend(block_ids)
            if self._must_be_seen is not None:
                self._confirmed.difference_update(block_ids)
                for registered in (self._registering, *self._in_flight.values()):
                    for block_id in registered.keys() & block_ids:
                        del registered[block_id]
        if attempt.failed:
            self._lose_track()
        return blocks

    def _lose_track(self) -> None:
        self._confirmed.clear()
        self._registering.clear()
        self._in_flight.clear()
        self._serial += 1  # the workers miss one, and forget everything

    def _schedule(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        self._serial += 1
        handed_out: tuple[int, ...] = ()
        if self._handed_out:
            handed_out, self._handed_out = tuple(self._handed_out), []
        setattr(output, NEWS_ATTRIBUTE, BlockNews(self._serial, handed_out))
        if self._must_be_seen is not None:
            self._in_flight[self._serial], self._registering = self._registering, {}
        return output

    def _cache_full_blocks(
        self,
        stock: Any,
        request: Any,
        blocks: Any,
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = stock(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            *args,
            **kwargs,
        )
        if kv_cache_group_id == self._group and self._must_be_seen is not None:
            for index in range(num_cached_blocks, num_full_blocks):
                self._registering[blocks[index].block_id] = _Registered(
                    request.request_id, index * block_size, (index + 1) * block_size
                )
        return result

    def note_step(self, scheduler_output: Any, report: StepReport | PackedReport | None) -> None:
        """What the workers say of a step that was scheduled. None: nothing."""
        if not self.notes_steps:
            return
        with self._failures.caught(Stage.LEDGER) as attempt:
            self._note_step(scheduler_output, report)
        if attempt.failed:
            self._lose_track()

    def _note_step(self, scheduler_output: Any, report: StepReport | PackedReport | None) -> None:
        news: BlockNews = getattr(scheduler_output, NEWS_ATTRIBUTE)
        registered = self._in_flight.pop(news.serial, {})
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled and (report is None or report.failed or report.failures):
            # A worker that had a fault may have lost what it kept.
            self._confirmed.clear()
            for req_id, start in step_starts(scheduler_output).items():
                if req_id not in self._requests:
                    continue  # it has ended; the step was ahead
                self._holes[req_id].append((start, start + scheduled.get(req_id, 0)))
        self._confirmed.update(
            block_id
            for block_id, block in registered.items()
            if block.req_id in scheduled and not self._has_hole(block)
        )

    def finish(self, req_id: str) -> None:
        self._holes.pop(req_id, None)

    def _has_hole(self, block: _Registered) -> bool:
        return any(
            start < block.stop and block.start < stop
            for start, stop in self._holes.get(block.req_id, ())
        )

    def _get_computed_blocks(self, stock: Any, request: Any) -> Any:
        found = stock(request)
        if self._must_be_seen is None or not self._must_be_seen(request):
            return found
        while (seen := self._tokens_seen(found[0])) is not None:
            # Asked again, with less to find, so that windows and states of other groups still fit.
            longest = min(seen, request.num_tokens - 1)
            hit, num_tokens, _ = self._manager.coordinator.find_longest_cache_hit(
                request.block_hashes, longest
            )
            found = self._manager.create_kv_cache_blocks(hit), num_tokens, 0
        return found

    def _tokens_seen(self, blocks: Any) -> int | None:
        """Tokens in front of the first block that was not confirmed, or None if all were."""
        for index, block in enumerate(blocks.blocks[self._group]):
            if block.block_id not in self._confirmed:
                return index * self._block_size
        return None
