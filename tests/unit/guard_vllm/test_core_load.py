"""How the use of experts gets from workers to the API server: asked for between steps, told once."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from guard_vllm import core_load
from guard_vllm.core_load import CORE_LOAD_METHOD, LOAD_SECONDS, CoreLoad
from guard_vllm.engine_core import EngineCoreGuard
from guard_vllm.settings import Settings
from guard_vllm.worker_load import LOAD_METHOD, LoadFacts, WorkerLoad
from prometheus_client import CollectorRegistry

from guard.device.load import LoadReading
from guard.events.bus import EventBus
from guard.events.load import ExpertCounts, decode_counts
from guard.events.message import Delta, Load
from guard.events.metrics import GuardMetrics
from guard.failures import Failures
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from tests.unit.device.driving import COUNT, TOPOLOGY, policy_text, rule_text
from tests.unit.guard_vllm.test_engine_core import Core, Scheduler, request, status_of, step

LAYERS, EXPERTS = (3, 5), (2, 3)
FACTS = LoadFacts(8, EXPERTS, None)


class Executor:
    """Its ranks count layers of a pipeline, or the same ones; an answer comes when it is let."""

    def __init__(self, *readings: LoadReading | None) -> None:
        self.readings: list[LoadReading | None] = list(readings)
        self.waiting: list[Future[Any]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.fault: Exception | None = None

    def collective_rpc(self, method: str, args: tuple[Any, ...] = (), non_block: bool = False) -> Any:
        assert method == LOAD_METHOD
        self.asked.append(args)
        if not non_block:
            return list(self.readings)
        future: Future[Any] = Future()
        self.waiting.append(future)
        return future

    def answer(self) -> None:
        [future] = self.waiting
        self.waiting.clear()
        if self.fault is not None:
            future.set_exception(self.fault)
        else:
            future.set_result(list(self.readings))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def of(*counts: list[int], tokens: int) -> LoadReading:
    return LoadReading(tokens, np.array(counts, dtype=np.int64))


FIRST = of([2, 0, 0], [0, 0, 0], tokens=4)
OTHER_STAGE = of([0, 0, 0], [1, 1, 2], tokens=4)


def core_of(*readings: LoadReading | None) -> Any:
    return SimpleNamespace(model_executor=Executor(*readings))


def status(facts: LoadFacts | None = FACTS) -> Any:
    return SimpleNamespace(layers=LAYERS, load=facts)


def asking(
    *readings: LoadReading | None, facts: LoadFacts | None = FACTS
) -> tuple[CoreLoad, Executor, list[Load], Clock]:
    core, told, clock = core_of(*readings), list[Load](), Clock()
    return CoreLoad(core, 2, status(facts), told.append, clock), core.model_executor, told, clock


def test_it_asks_every_few_seconds_and_never_waits_for_an_answer() -> None:
    load, executor, told, clock = asking(FIRST)
    for _ in range(3):
        load.ask_if_due()
    assert executor.asked == []
    clock.now += LOAD_SECONDS
    for _ in range(3):
        load.ask_if_due()
    clock.now += LOAD_SECONDS
    load.ask_if_due()
    assert executor.asked == [(False,)], "one question at a time"
    assert told == []

    executor.answer()
    load.ask_if_due()

    assert [(one.engine, one.tokens, [layer.layer for layer in one.layers]) for one in told] == [
        (2, 4, [3])
    ]
    assert executor.asked == [(False,)] * 2


def test_ranks_of_a_pipeline_add_up_and_those_that_repeat_others_say_nothing() -> None:
    load, executor, told, clock = asking(FIRST, None, OTHER_STAGE, None)
    clock.now += LOAD_SECONDS
    load.ask_if_due()
    executor.answer()
    load.ask_if_due()
    [one] = told
    assert one.tokens == 4
    assert [(layer.layer, layer.max_share) for layer in one.layers] == [(3, 1.0), (5, 0.5)]


def test_what_was_told_is_not_told_again_and_what_did_not_get_out_is() -> None:
    core, told, clock = core_of(FIRST), list[Load](), Clock()
    broken = [True]

    def tell(one: Load) -> None:
        if broken[0]:
            raise RuntimeError("injected")
        told.append(one)

    load = CoreLoad(core, 0, status(), tell, clock)

    def turn() -> None:
        clock.now += LOAD_SECONDS
        load.ask_if_due()
        core.model_executor.answer()
        load.ask_if_due()

    with pytest.raises(RuntimeError):
        turn()
    broken[0] = False
    turn()
    turn()
    core.model_executor.readings = [of([2, 6, 0], [0, 0, 0], tokens=10)]
    turn()
    assert [one.tokens for one in told] == [4, 6]
    assert told[1].layers[0].effective_experts == 1


def test_a_fault_of_a_worker_is_one_of_the_question_and_the_next_one_is_asked() -> None:
    load, executor, told, clock = asking(FIRST)
    executor.fault = RuntimeError("injected")
    clock.now += LOAD_SECONDS
    load.ask_if_due()
    executor.answer()
    with pytest.raises(RuntimeError):
        load.ask_if_due()
    executor.fault = None
    clock.now += LOAD_SECONDS
    load.ask_if_due()
    executor.answer()
    load.ask_if_due()
    assert [one.tokens for one in told] == [4]


def test_nobody_is_asked_where_nothing_is_counted_or_another_core_tells() -> None:
    load, executor, _, clock = asking(FIRST, facts=None)
    silent_core = core_of(FIRST)
    silent = CoreLoad(silent_core, 0, status(), None, clock)
    clock.now += LOAD_SECONDS
    load.ask_if_due()
    silent.ask_if_due()
    assert executor.asked == silent_core.model_executor.asked == []
    assert decode_counts(load.load()) == ExpertCounts(0, 0, [])


def test_all_counts_can_be_read_by_logical_id_and_the_models_own_layers() -> None:
    core = core_of(FIRST, OTHER_STAGE)
    CoreLoad(core, 0, status(), None)
    counted = decode_counts(getattr(core, CORE_LOAD_METHOD)())

    assert core.model_executor.asked == [(True,)]
    assert (counted.tokens, counted.sampled_every) == (4, 8)
    assert [(layer.layer, layer.counts) for layer in counted.layers] == [(3, [2, 0]), (5, [1, 1, 2])]
    loads = [layer.load for layer in counted.layers]
    assert [None if load is None else load.max_share for load in loads] == [1.0, 0.5]
    assert decode_counts(CoreLoad(core_of(None), 0, status(), None).load()).layers == []


def test_baselines_are_those_of_the_program_in_force() -> None:
    def facts(share: float) -> LoadFacts:
        baseline_LE = np.zeros((2, 3))
        baseline_LE[0, :2] = [share, 1 - share]
        return LoadFacts(8, EXPERTS, baseline_LE)

    load, executor, told, clock = asking(of([5, 5, 0], [1, 0, 0], tokens=10), facts=facts(0.5))
    for share, factor in ((0.5, 1), (1.0, 2)):
        load.follow(status(facts(share)))
        executor.readings = [of([5 * factor, 5 * factor, 0], [factor, 0, 0], tokens=10 * factor)]
        clock.now += LOAD_SECONDS
        load.ask_if_due()
        executor.answer()
        load.ask_if_due()
    found = [[layer.divergence_nats for layer in one.layers] for one in told]
    assert found[0] == [pytest.approx(0, abs=1e-12), None]
    assert found[1][0] == pytest.approx(0.2157615543)
    assert found[1][1] is None, "the profile does not know this layer"


class Counts:
    """A guard's, which says how it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def read(self) -> LoadReading:
        self.asked.append("read")
        return FIRST

    def poll(self) -> LoadReading | None:
        self.asked.append("poll")
        raise RuntimeError("injected")


def test_a_worker_never_raises_and_speaks_only_for_ranks_that_say_the_same() -> None:
    guard: Any = SimpleNamespace(load=Counts(), failures=Failures())
    worker, other = SimpleNamespace(), SimpleNamespace()
    WorkerLoad(guard, reads=True).hook(worker)
    WorkerLoad(guard, reads=False).hook(other)

    assert getattr(worker, LOAD_METHOD)(True) is FIRST
    assert getattr(worker, LOAD_METHOD)(False) is None
    assert getattr(other, LOAD_METHOD)(True) is None
    assert guard.load.asked == ["read", "poll"]
    assert guard.failures.take() == {"metrics": 1}


def test_a_programs_facts_have_its_layers_and_its_first_baselines() -> None:
    program = compile_policies(parse_policies(policy_text(rule_text(COUNT))), TOPOLOGY)
    facts = LoadFacts.of(program, 8)
    assert (facts.every, facts.experts, facts.baseline_LE) == (8, (8, 8), None)


class LoadCore(Core):
    """Counts a token more of expert 0 for each question."""

    def __init__(self, text: str) -> None:
        program = compile_policies(parse_policies(text), TOPOLOGY)
        found = status_of(text)
        object.__setattr__(found, "layers", (0, 1))
        object.__setattr__(found, "load", LoadFacts.of(program, 8))
        super().__init__(found)
        status_rpc, self.questions = self.model_executor.collective_rpc, 0

        def collective_rpc(method: str, args: Any = (), non_block: bool = False) -> Any:
            if method != LOAD_METHOD:
                return status_rpc(method)
            self.questions += 1
            counts_LE = np.zeros((2, 8), dtype=np.int64)
            counts_LE[:, 0] = self.questions
            future: Future[Any] = Future()
            future.set_result([LoadReading(self.questions, counts_LE)])
            return future if non_block else future.result()

        self.model_executor = SimpleNamespace(collective_rpc=collective_rpc)


def test_several_api_servers_and_engines_count_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_load, "LOAD_SECONDS", 0.0)
    registries = [CollectorRegistry(), CollectorRegistry()]
    buses = [EventBus(GuardMetrics("m", registry), "m") for registry in registries]
    text = policy_text(rule_text(COUNT))
    for _ in range(2):  # the second time another core of the same engine, as after a restart
        for engine in (0, 1):
            core = LoadCore(text)
            core.engine_index = engine
            EngineCoreGuard(core, Settings(policies="p"))
            core.scheduler = Scheduler()
            core.add_request(request("a"))
            for _ in range(3):
                step(core, None, "a")
            core.scheduler.requests.clear()
            core.post_step(model_executed=True)
            while not core.output_queue.empty():
                client, outputs = core.output_queue.get_nowait()
                buses[client].receive(outputs.utility_output.result.result)
            assert core.questions == 4, "the last answer is still to be looked at"

    def value(registry: CollectorRegistry, name: str, engine: str, **labels: str) -> float | None:
        found = {"model_name": "m", "engine": engine, **labels}
        return registry.get_sample_value(f"moe_guard_{name}", found)

    for name in ("0", "1"):
        assert value(registries[0], "load_tokens_total", name) == 6
        assert value(registries[0], "layer_max_share", name, layer="1") == 1
        assert value(registries[0], "steps_total", name) == 6
        assert (value(registries[0], "host_seconds_total", name, part="ledger") or 0) > 0
        assert value(registries[1], "load_tokens_total", name) == 0
        assert value(registries[1], "steps_total", name) == 0
        assert value(registries[0], "failures_total", name, stage="metrics") == 0


def test_a_question_that_fails_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_load, "LOAD_SECONDS", 0.0)
    core = LoadCore(policy_text(rule_text(COUNT)))
    EngineCoreGuard(core, Settings(policies="p"))
    core.scheduler = Scheduler()
    core.model_executor = SimpleNamespace()  # which cannot be asked
    core.add_request(request("a"))
    core.sent()
    for _ in range(2):
        step(core, None, "a")
    core.scheduler.requests.clear()
    core.post_step(model_executed=True)
    told = [message for _, message in core.sent()]
    assert sum(one.failures.get("metrics", 0) for one in told if isinstance(one, Delta)) == 2
