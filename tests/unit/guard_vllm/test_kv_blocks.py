"""What the engine core tells of KV blocks, and which it lets requests find: on vLLM's own manager."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_vllm.kv_blocks import KVBlocks
from guard_vllm.kv_isolation import Isolation
from guard_vllm.prefix_evidence import (
    NEWS_ATTRIBUTE,
    KeptGroup,
    PrefixEvidence,
    kept_group,
    memory_share,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from guard.failures import Failures
from guard.program.step_report import StepReport
from tests.unit.guard_vllm.test_kv_isolation import OUTPUT, STATIC, status

BLOCK = 4
NUM_BLOCKS = 12
TEXT = list(range(100, 112))
SPEC: dict[str, Any] = {
    "block_size": BLOCK,
    "num_kv_heads": 1,
    "head_size": 8,
    "dtype": torch.float32,
}
FULL = KVCacheGroupSpec(["full"], FullAttentionSpec(**SPEC))
WINDOW = KVCacheGroupSpec(["window"], SlidingWindowSpec(**SPEC, sliding_window=8))
FAILED = StepReport.of_failed_step("rev", ["a"], {})
FINE = replace(FAILED, failed=False)


class Scheduler:
    """Schedules what a test says, with vLLM's own KV cache manager."""

    connector = None
    hash_block_size = BLOCK

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        self.kv_cache_manager = KVCacheManager(
            KVCacheConfig(num_blocks, [], [FULL]),
            max_model_len=64,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
        )
        self.requests: dict[str, Any] = {}

    def schedule(self, *counts: tuple[Any, int]) -> Any:
        """Each request computes so many tokens, behind what it finds in the cache when it is new."""
        scheduled, new = {}, []
        for request, count in counts:
            found, num_found = self.kv_cache_manager.empty_kv_cache_blocks, 0
            if request.num_computed_tokens == 0:
                found, num_found, _ = self.kv_cache_manager.get_computed_blocks(request)
            allocated = self.kv_cache_manager.allocate_slots(request, count, num_found, found)
            assert allocated is not None
            request.num_computed_tokens += num_found
            self.requests[request.request_id] = request
            new.append(
                SimpleNamespace(
                    req_id=request.request_id, num_computed_tokens=request.num_computed_tokens
                )
            )
            request.num_computed_tokens += count
            scheduled[request.request_id] = count
        cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
        return SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=scheduled
        )

    def blocks(self, request: Any) -> list[int]:
        [block_ids] = self.kv_cache_manager.get_block_ids(request.request_id)
        return list(block_ids)

    def found(self, request: Any) -> int:
        return int(self.kv_cache_manager.get_computed_blocks(request)[1])


@pytest.fixture(autouse=True)
def hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache_utils.init_none_hash(sha256)
    stock = kv_cache_utils.generate_block_hash_extra_keys
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", stock)


def request(req_id: str, text: list[int] = TEXT) -> Any:
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
    return Request(req_id, [*text, 7], SamplingParams(max_tokens=9), None, block_hasher=hasher)


def hung_on(scheduler: Scheduler, *, must_be_seen: bool = True) -> tuple[KVBlocks, Failures]:
    failures = Failures()
    asks = (lambda request: request.request_id.startswith("closed")) if must_be_seen else None
    return KVBlocks(scheduler, KeptGroup(0, NUM_BLOCKS, BLOCK), failures, asks), failures


def news(output: Any) -> Any:
    return pickle.loads(pickle.dumps(getattr(output, NEWS_ATTRIBUTE)))


def test_workers_hear_of_every_block_that_was_handed_out_and_of_no_other() -> None:
    scheduler = Scheduler()
    hung_on(scheduler, must_be_seen=False)
    first = request("a")
    step = scheduler.schedule((first, 13))
    assert news(step) == (1, tuple(scheduler.blocks(first)))

    second = request("b")
    step = scheduler.schedule((second, 1))
    assert scheduler.blocks(second)[:3] == scheduler.blocks(first)[:3]
    assert news(step) == (2, tuple(scheduler.blocks(second)[3:]))
    assert news(scheduler.schedule()) == (3, ())


def test_blocks_that_were_freed_and_given_to_another_are_told_again() -> None:
    scheduler = Scheduler(num_blocks=5)
    hung_on(scheduler, must_be_seen=False)
    first, other = request("a"), request("b", TEXT[::-1])
    scheduler.schedule((first, 13))
    freed = set(scheduler.blocks(first))
    scheduler.kv_cache_manager.free(first)

    assert set(news(scheduler.schedule((other, 13))).handed_out) == freed


def test_a_request_that_must_be_judged_finds_what_was_seen_and_no_more() -> None:
    scheduler = Scheduler()
    blocks, _ = hung_on(scheduler)
    first, rest = scheduler.schedule((request("a"), 8)), None
    assert scheduler.found(request("closed")) == 0, "the step has not been reported yet"
    assert scheduler.found(request("open")) == 8
    blocks.note_step(first, FINE)
    assert scheduler.found(request("closed")) == 8

    rest = scheduler.schedule((scheduler.requests["a"], 5))
    assert scheduler.found(request("open")) == 12
    assert scheduler.found(request("closed")) == 8
    blocks.note_step(rest, FINE)
    assert scheduler.found(request("closed")) == 12


@pytest.mark.parametrize("report", [FAILED, None])
def test_what_a_failed_step_computed_is_not_found_by_a_request_that_must_be_judged(
    report: StepReport | None,
) -> None:
    scheduler = Scheduler()
    blocks, _ = hung_on(scheduler)
    blocks.note_step(scheduler.schedule((request("a"), 6)), report)
    blocks.note_step(scheduler.schedule((scheduler.requests["a"], 7)), FINE)

    assert scheduler.found(request("open")) == 12
    assert scheduler.found(request("closed")) == 0
    registered = scheduler.blocks(scheduler.requests["a"])
    assert registered[2] in blocks._confirmed
    assert not {*registered[:2]} & blocks._confirmed, "half of the second one was not seen"


def test_a_block_that_changed_hands_before_its_step_was_reported_is_not_confirmed() -> None:
    scheduler = Scheduler(num_blocks=5)
    blocks, _ = hung_on(scheduler)
    first = request("a")
    step = scheduler.schedule((first, 13))
    scheduler.kv_cache_manager.free(first)
    scheduler.schedule((request("b", TEXT[::-1]), 13))
    blocks.note_step(step, FINE)

    assert blocks._confirmed == set()


def test_a_fault_in_the_books_makes_workers_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    blocks, failures = hung_on(scheduler)
    blocks.note_step(scheduler.schedule((request("a"), 8)), FINE)
    monkeypatch.setattr(blocks, "_handed_out", None)
    step = scheduler.kv_cache_manager.block_pool.get_new_blocks(1)
    assert len(step) == 1
    monkeypatch.setattr(blocks, "_handed_out", [])

    assert failures.count == {"ledger": 1}
    assert news(scheduler.schedule()).serial == 3, "2 is missing"
    assert scheduler.found(request("closed")) == 0


def test_a_worker_that_missed_news_forgets_everything() -> None:
    calls: list[Any] = []
    kept = SimpleNamespace(
        forget_all=lambda: calls.append("all"),
        forget=lambda ids: calls.append(tuple(ids)),
        copy=lambda *pairs: calls.append(pairs),
    )
    evidence = PrefixEvidence(SimpleNamespace(judges=True), kept, 0)  # type: ignore[arg-type]

    def step(serial: int | None) -> Any:
        output = SimpleNamespace(
            kv_cache_block_copies=None,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        )
        if serial is not None:
            setattr(output, NEWS_ATTRIBUTE, SimpleNamespace(serial=serial, handed_out=(serial,)))
        return output

    for serial in (1, 2, 4, 5, None, 6):
        evidence.admit(step(serial))
    assert calls == [(1,), (2,), "all", (4,), (5,), "all", (6,)]


def test_evidence_goes_by_the_group_that_holds_all_tokens() -> None:
    assert kept_group(KVCacheConfig(9, [], [WINDOW, FULL])) == (1, 9, BLOCK)
    assert kept_group(KVCacheConfig(9, [], [WINDOW])) is None


def test_a_fault_takes_back_the_names_of_blocks_that_should_have_been_masked() -> None:
    isolation = Isolation(status(STATIC))
    isolation.install()
    scheduler = Scheduler()
    first, sharing, waiting = request("a"), request("b"), request("c")
    scheduler.schedule((first, 6))
    scheduler.schedule((first, 7), (sharing, 1))
    assert scheduler.found(waiting) == 12
    isolation.distrust(scheduler, first, 6)

    assert scheduler.found(waiting) == 4, "the first block was computed before"
    assert first.block_hashes[0] == sharing.block_hashes[0] == waiting.block_hashes[0]
    assert len({r.block_hashes[1] for r in (first, sharing, waiting)}) == 3
    sharing.append_output_token_ids([1, 2, 3])
    scheduler.schedule((sharing, 3))
    continued = request("d", [*TEXT, 7, 1, 2, 3])
    assert scheduler.found(continued) == 4


def test_a_fault_leaves_requests_that_no_mask_is_for_alone() -> None:
    isolation = Isolation(status(OUTPUT))
    isolation.install()
    scheduler = Scheduler()
    first = request("a")
    scheduler.schedule((first, 13))
    isolation.distrust(scheduler, first, 0)

    assert scheduler.found(request("b")) == 12


def test_room_for_evidence_is_bounded_by_the_smallest_kind_of_layer() -> None:
    full, window = FULL.kv_cache_spec, WINDOW.kv_cache_spec
    specs = {"full-0": full, "full-1": full, "window": window}
    least = window.page_size_bytes

    assert memory_share(specs, 16) == BLOCK * 16 / (least + BLOCK * 16)
    assert memory_share({"window": window}, 16) == 0.0
