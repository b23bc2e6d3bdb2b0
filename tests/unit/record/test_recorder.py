"""A recorder writes each request's accepted rows once, and nothing that it does reaches the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.device.layout import Capacity
from guard.device.tap import RoutingTap
from guard.failures import Failures, Stage
from guard.program.topology import MoELayer, Topology
from guard.record import recorder as recorder_module
from guard.record.recorder import TraceRecorder
from guard.trace.format import TracedRequest, TraceHeader
from guard.trace.reader import TraceReader
from guard.trace.writer import TraceWriter
from tests.support.drills import drilling

TOPOLOGY = Topology("TestMoe", (MoELayer(0, 64, 2), MoELayer(1, 64, 2)))


class Driver:
    """Feeds a recorder as an engine does. A row's first expert in a layer says whose it is."""

    def __init__(self, path: Path, sample: float = 1.0, max_bytes: int | None = None) -> None:
        self.path = path
        self.failures = Failures()
        self.tap = RoutingTap(TOPOLOGY, Capacity(64, 8), torch.device("cpu"))
        writer = TraceWriter(path, TraceHeader("m", TOPOLOGY), max_bytes)
        self.recorder = TraceRecorder(writer, self.tap, self.failures, sample)

    def step(
        self,
        rows: dict[str, range],
        rejected: Sequence[int] | None = None,
        silent_layer: int | None = None,
        shift: int = 0,
    ) -> None:
        """rows: of each request, the positions that the step computes; shift: other experts than at
        other times."""
        starts = np.cumsum([0, *map(len, rows.values())])
        positions = torch.tensor([p for span in rows.values() for p in span])
        self.recorder.begin_step(list(rows), torch.from_numpy(starts), positions)
        self.tap.clear_rows(len(positions))
        owners = [expert_of(req_id, p + shift) for req_id, span in rows.items() for p in span]
        for layer in range(2):
            if layer != silent_layer:
                ids = torch.tensor([[owner, 63] for owner in owners])
                self.tap.record(layer, ids, torch.full((len(owners), 2), 0.5))
        self.recorder.end_step(None if rejected is None else torch.tensor(rejected))
        self.tap.clear()  # the next step writes over what this one left

    def read(self) -> dict[str, TracedRequest]:
        self.recorder.close()
        return {request.request_id: request for request in TraceReader(self.path)}


def expert_of(req_id: str, position: int) -> int:
    return (ord(req_id) * 7 + position) % 60


def assert_whole(request: TracedRequest, positions: Sequence[int]) -> None:
    """Its trace is of these positions, and each row is its own."""
    routing = request.routing
    seen = [p for p in range(len(routing.topk_ids)) if routing.is_seen(p)]
    assert seen == list(positions)
    owners = [expert_of(request.request_id, p) for p in positions]
    assert routing.topk_ids[seen][:, :, 0].tolist() == [[owner, owner] for owner in owners]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path / "a.moetrace")
    yield made
    made.recorder.close()


def test_chunked_prompts_and_outputs_of_several_requests_are_told_apart(driver: Driver) -> None:
    driver.recorder.add_request("a", 5)
    driver.recorder.add_request("b", 2)
    driver.step({"a": range(3), "b": range(2)})
    driver.step({"b": range(2, 3), "a": range(3, 5)})
    driver.recorder.finish_requests(["b"])
    driver.step({"a": range(5, 6)})
    driver.recorder.finish_requests(["a"])
    traced = driver.read()
    assert list(traced) == ["b", "a"]
    assert traced["a"].routing.num_prompt_tokens == 5
    assert_whole(traced["a"], range(6))
    assert_whole(traced["b"], range(3))


def test_a_recompute_after_preemption_is_recorded_once(driver: Driver) -> None:
    driver.recorder.add_request("a", 3)
    driver.step({"a": range(3)})
    driver.step({"a": range(3, 4)})
    driver.recorder.add_request("a", 3)
    driver.step({"a": range(4)}, shift=5)
    driver.step({"a": range(4, 6)})
    driver.recorder.finish_requests(["a"])
    assert_whole(driver.read()["a"], range(6))


def test_rejected_drafts_are_not_recorded_and_come_again(driver: Driver) -> None:
    driver.recorder.add_request("a", 2)
    driver.step({"a": range(2)})
    driver.step({"a": range(2, 6)}, rejected=[3])
    driver.step({"a": range(3, 6)}, rejected=[0])
    driver.step({"a": range(6, 9)}, rejected=[2])
    driver.recorder.finish_requests(["a"])
    assert_whole(driver.read()["a"], range(7))


def test_positions_behind_the_end_are_cut(driver: Driver) -> None:
    driver.recorder.add_request("a", 2)
    driver.step({"a": range(5)})
    driver.recorder.finish_requests(["a"], {"a": 3})
    assert_whole(driver.read()["a"], range(3))


def test_a_cached_prefix_is_unseen(driver: Driver) -> None:
    driver.recorder.add_request("a", 6)
    driver.step({"a": range(4, 7)})
    driver.recorder.finish_requests(["a"])
    request = driver.read()["a"]
    assert request.routing.first_seen == 4
    assert_whole(request, range(4, 7))


def test_a_row_that_a_layer_did_not_report_is_unseen(driver: Driver) -> None:
    driver.recorder.add_request("a", 2)
    driver.step({"a": range(2)})
    driver.step({"a": range(2, 3)}, silent_layer=1)
    driver.step({"a": range(3, 4)})
    driver.recorder.finish_requests(["a"])
    assert_whole(driver.read()["a"], [0, 1, 3])


def test_only_a_sample_of_requests_is_recorded(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "a.moetrace", sample=0.5)
    names = [chr(ord("A") + n) for n in range(40)]
    for name in names:
        driver.recorder.add_request(name, 1)
        driver.step({name: range(1)})
        driver.recorder.finish_requests([name])
    assert 8 < len(driver.read()) < 32


def test_what_is_under_way_at_the_end_is_written(driver: Driver) -> None:
    driver.recorder.add_request("a", 2)
    driver.step({"a": range(2)})
    driver.recorder.flush()
    assert [one.request_id for one in TraceReader(driver.path)] == ["a"]


def test_a_full_trace_takes_no_more_and_says_so_once(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "a.moetrace", max_bytes=420)
    for name in "abcdefgh":
        driver.recorder.add_request(name, 1)
        driver.step({name: range(1)})
        driver.recorder.finish_requests([name])
    read = driver.read()
    assert 0 < len(read) < 8
    assert driver.recorder.full
    assert driver.failures.count[Stage.RECORD] == 1
    assert driver.path.stat().st_size <= 420


def test_a_writer_that_does_not_keep_up_costs_rows_and_not_the_engine(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.recorder.add_request("a", 2)
    driver.step({"a": range(2)})
    monkeypatch.setattr(recorder_module, "MAX_QUEUED_BYTES", -1)
    driver.step({"a": range(2, 3)})
    monkeypatch.undo()
    driver.step({"a": range(3, 4)})
    driver.recorder.finish_requests(["a"])
    assert_whole(driver.read()["a"], [0, 1, 3])
    assert driver.failures.count[Stage.RECORD] == 1


def test_a_writer_that_stands_still_takes_no_more_requests(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_QUEUED_BYTES", -1)
    for number in range(100):
        driver.recorder.add_request(f"late-{number}", 1)
    assert driver.recorder._queue.qsize() == 0
    assert driver.failures.count[Stage.RECORD] == 100
    monkeypatch.undo()
    driver.recorder.add_request("a", 1)
    driver.step({"a": range(1)})
    driver.recorder.finish_requests(["a"])
    assert driver.read().keys() == {"a"}


@pytest.mark.parametrize("entry", [1, 2, 3])
def test_a_recorder_that_fails_costs_rows_and_not_the_engine(tmp_path: Path, entry: int) -> None:
    driver = Driver(tmp_path / "a.moetrace")
    with drilling(f"record@{entry}") as drill:
        driver.recorder.add_request("a", 1)
        driver.step({"a": range(1)})
        driver.recorder.finish_requests(["a"])
        driver.recorder.flush()
    driver.recorder.add_request("b", 1)
    driver.step({"b": range(1)})
    driver.recorder.finish_requests(["b"])
    assert "b" in driver.read()
    assert driver.failures.count[Stage.RECORD] == drill.struck[Stage.RECORD] == 1


def test_a_fault_in_a_step_is_counted_and_never_raised(driver: Driver) -> None:
    driver.recorder.add_request("a", 2)
    driver.recorder.begin_step(["a"], torch.tensor([0, 2]), torch.tensor([0, 1]))
    del driver.tap.topk_ids_TLK
    driver.recorder.end_step()
    assert driver.failures.count[Stage.RECORD] == 1
