"""What becomes of a request that meets a fault, under `onError: open` and `closed`: injected by a
drill, from the worker to the metrics, without vLLM's engine between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from guard_vllm.core_reload import CoreReload
from guard_vllm.engine_core import EngineCoreGuard
from guard_vllm.settings import Settings
from guard_vllm.worker_reload import WorkerReload
from prometheus_client import CollectorRegistry

from guard.events.bus import EventBus
from guard.events.metrics import GuardMetrics
from guard.failures import Failures, Stage
from guard.policy import parse_policies
from guard.program.codec import encode_program
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.runtime import Guard
from tests.support.drills import drilling
from tests.unit.device.driving import BLOCK, COUNT, OTHER, TOPOLOGY, Engine, policy_text, rule_text
from tests.unit.guard_vllm.test_engine_core import Core, Scheduler, request, status_of, step

MODES = ("open", "closed")
Got = tuple[list[int], bool]
PASSES: Got = ([7], False)
ENDS: Got = ([], True)
REASON = {"open": None, "closed": "moe_guard:p/r"}
OUTCOME = {"open": "unjudged", "closed": "blocked"}

FAULTS = {
    "admit": "admit@1",
    "slot": "admit@2",
    "rows": "begin_step@1",
    "evaluate": "evaluate@1",
    "evaluate and its repair": "evaluate@1,evaluate@2",
    "routing": "routing@1",
    "ledger": "ledger@1",
    "ledger twice": "ledger@1,ledger@2",
    "ledger and worker": "evaluate@1,ledger@1",
}


def text_of(on_error: str) -> str:
    """A rule that does not fire."""
    return policy_text(rule_text(COUNT, BLOCK), extra=f"  onError: {on_error}\n")


@dataclass
class Life:
    """A request `a`, from its first step to its end, and what the metrics then say."""

    registry: CollectorRegistry
    bus: EventBus
    got: Got
    stop_reason: str | None

    def metric(self, name: str, **labels: str) -> float:
        labels = {"model_name": "m", "engine": "0", **labels}
        return self.registry.get_sample_value(f"moe_guard_{name}", labels) or 0.0

    @property
    def outcomes(self) -> dict[str, float]:
        names = ("passed", "observed", "unjudged", "masked", "blocked")
        counts = {name: self.metric("requests_total", outcome=name) for name in names}
        return {name: count for name, count in counts.items() if count}

    @property
    def faults(self) -> dict[str, float]:
        counts = {str(stage): self.metric("failures_total", stage=str(stage)) for stage in Stage}
        return {stage: count for stage, count in counts.items() if count}


def live(on_error: str, faults: str, *, blind: bool = False) -> Life:
    """Two steps; the drill is in the first one and in what comes before it."""
    text = text_of(on_error)
    engine, core = Engine(text), Core(status_of(text))
    EngineCoreGuard(core, Settings(policies="p"))
    core.scheduler = Scheduler()
    registry = CollectorRegistry()
    bus = EventBus(GuardMetrics("m", registry), "m")
    deliver(core, bus)
    one = request("a")
    core.add_request(one)
    engine.guard.blind = blind
    with drilling(faults):
        engine.guard.add_request("a", 1)
        step(core, engine.step({"a": (0, [OTHER])}), "a")
        deliver(core, bus)
    got = core.scheduler.got["a"]
    if not got[1]:
        core.scheduler.sampled["a"] = [7, Scheduler.stop_token]
        step(core, engine.step({"a": (1, [OTHER])}), "a")
    core.post_step(model_executed=False)
    deliver(core, bus)
    return Life(registry, bus, got, one.stop_reason)


def deliver(core: Core, bus: EventBus) -> None:
    """What the first API server gets."""
    while not core.output_queue.empty():
        client, outputs = core.output_queue.get_nowait()
        if client == 0:
            bus.receive(outputs.utility_output.result.result)


@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_request_that_meets_a_fault_follows_on_error_and_is_counted_once(
    name: str, on_error: str
) -> None:
    life = live(on_error, FAULTS[name])

    assert life.got == (PASSES if on_error == "open" else ENDS)
    assert life.stop_reason == REASON[on_error]
    assert life.outcomes == {OUTCOME[on_error]: 1}
    assert life.faults == {
        stage: FAULTS[name].count(f"{stage}@") for stage in map(str, Stage) if stage in FAULTS[name]
    }


@pytest.mark.parametrize("on_error", MODES)
def test_a_guard_that_is_blind_judges_nobody_and_requests_follow_on_error(on_error: str) -> None:
    life = live(on_error, "record@1", blind=True)

    assert life.got == (PASSES if on_error == "open" else ENDS)
    assert life.outcomes == {OUTCOME[on_error]: 1}
    assert life.metric("up") == 0


@pytest.mark.parametrize("on_error", MODES)
def test_where_the_ledger_can_enter_nothing_at_all_requests_follow_on_error_too(on_error: str) -> None:
    """Nobody can name the rule then, and the ends of its requests are not counted."""
    life = live(on_error, "ledger@*")

    assert life.got == (PASSES if on_error == "open" else ENDS)
    assert life.stop_reason == (None if on_error == "open" else "moe_guard")
    assert life.faults.keys() == {"ledger"}


@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("faults", ["evaluate=1ms@*", "ledger=1ms@*,admit=1ms@*,begin_step=1ms@*"])
def test_a_stage_that_takes_long_changes_no_request(on_error: str, faults: str) -> None:
    life = live(on_error, faults)

    assert life.got == PASSES
    assert life.outcomes == {"passed": 1}
    assert life.faults == {}
    assert life.metric("up") == 1


@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("faults", ["deliver@1", "deliver@2", "deliver@*", "deliver@1,deliver@3"])
def test_counters_that_could_not_be_delivered_come_with_the_next_message(
    on_error: str, faults: str
) -> None:
    life = live(on_error, faults)

    assert life.got == PASSES
    assert life.outcomes == {"passed": 1}
    assert life.metric("tokens_evaluated_total", phase="prompt") == 1
    assert life.faults.keys() == {"deliver"}


@pytest.mark.parametrize("on_error", MODES)
def test_a_message_that_is_lost_is_noticed_by_the_number_of_the_next_one(on_error: str) -> None:
    life = live(on_error, "message@1")

    assert life.got == PASSES
    assert life.faults == {"deliver": 1}


@pytest.mark.parametrize("on_error", MODES)
def test_counters_that_could_not_be_shown_are_lost_and_said_to_be(on_error: str) -> None:
    # Entries of `metrics`: the use of experts in the worker, the engine core's question, then the bus.
    life = live(on_error, "metrics@3")

    assert life.got == PASSES
    assert life.faults == {"metrics": 1}


class Worker:
    """One rank's guard, with what the engine core calls for a reload."""

    def __init__(self, program: Program) -> None:
        self.guard: Guard = Engine("", compiled=program).guard
        WorkerReload(self.guard, lambda program: status_of_revision(program.revision)).hook(self)


def status_of_revision(revision: str) -> Any:
    class Status:
        pass

    status = Status()
    status.revision = revision  # type: ignore[attr-defined]
    return status


class Ranks:
    """An engine core of two workers that reloads."""

    def __init__(self, on_error: str) -> None:
        self.before = compiled(text_of(on_error))
        self.workers = [Worker(self.before) for _ in range(2)]
        self.failures = Failures()
        self.followed: list[str] = []
        core: Any = Core()
        core.model_executor.collective_rpc = self._rpc
        self.reload = CoreReload(core, self._follow, dict, self.failures)

    def _rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]

    def _follow(self, statuses: list[Any]) -> None:
        self.followed.append(statuses[0].revision)

    def prepare(self, program: Program) -> str:
        fault = self.reload.prepare(encode_program(program))
        while fault is None:
            fault = self.reload.prepare()
        return fault

    @property
    def revisions(self) -> list[str]:
        return [worker.guard.program.revision for worker in self.workers]

    @property
    def blind(self) -> list[bool]:
        return [worker.guard.blind for worker in self.workers]


def compiled(text: str, before: Program | None = None) -> Program:
    return compile_policies(parse_policies(text), TOPOLOGY, before)


def another(ranks: Ranks) -> Program:
    return compiled(policy_text(rule_text(COUNT, name="other")), ranks.before)


@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("entry", range(1, 5))
def test_a_fault_while_a_reload_is_prepared_leaves_the_policies_before_in_force(
    on_error: str, entry: int
) -> None:
    ranks = Ranks(on_error)
    with drilling(f"reload@{entry}"):
        fault = ranks.prepare(another(ranks))

    assert "could not build it" in fault
    assert ranks.reload.commit() == "nothing was prepared"
    assert ranks.revisions == [ranks.before.revision] * 2
    assert ranks.blind == [False, False]
    assert not ranks.prepare(another(ranks))
    assert not ranks.reload.commit(), "the next one is taken"


@pytest.mark.parametrize("on_error", MODES)
def test_a_fault_of_every_worker_at_the_commit_leaves_the_policies_before_in_force(
    on_error: str,
) -> None:
    ranks = Ranks(on_error)
    assert not ranks.prepare(another(ranks))
    with drilling("reload@1,reload@2"):
        assert "could not install it" in ranks.reload.commit()

    assert ranks.revisions == [ranks.before.revision] * 2
    assert ranks.blind == [False, False]
    assert ranks.followed == []


@pytest.mark.parametrize("on_error", MODES)
@pytest.mark.parametrize("entry", [1, 2, 3])
def test_ranks_or_an_engine_core_that_stayed_behind_judge_nothing_until_a_restart(
    on_error: str, entry: int
) -> None:
    """1, 2: a worker's commit; 3: the engine core following them."""
    ranks = Ranks(on_error)
    assert not ranks.prepare(another(ranks))
    with drilling(f"reload@{entry}"):
        assert ranks.reload.commit()

    assert ranks.blind == [True, True]
    assert "restart the server" in ranks.prepare(another(ranks))
