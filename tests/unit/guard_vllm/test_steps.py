"""Hooks on a model runner: what is a step and what is a dummy run, and how the report travels."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_vllm.prefix_evidence import NEWS_ATTRIBUTE, BlockNews, PrefixEvidence
from guard_vllm.runners import hook_runner
from guard_vllm.steps import REPORT_ATTRIBUTE, Hook, StepHooks, with_report, wrap
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from guard.device.check import CHECK_EVERY_STEPS
from guard.device.readback import Readback
from guard.errors import UnsupportedHostError
from guard.failures import Failures
from guard.program.applicability import RequestFacts
from guard.program.step_report import StepReport
from tests.support.drills import drilling
from tests.support.opened import opened
from tests.unit.device.driving import COUNT, OTHER, Engine, policy_text, rule_text
from tests.unit.events.reports import Row, packed, report

REPORT = StepReport.of_failed_step("rev", ["a"], {})


class Recorder:
    """A guard that notes what it is told."""

    is_idle = False

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.failures = Failures()

    def idle(self) -> None:
        self.calls.append("idle")

    def add_request(self, req_id: str, prompt: int, facts: RequestFacts) -> None:
        assert facts.request_id == req_id
        self.calls.append(("add", req_id, prompt, tuple(facts.enforced)))

    def finish_requests(self, req_ids: Any) -> None:
        self.calls.append(("finish", *sorted(req_ids)))


class Runner:
    def __init__(self) -> None:
        self.output: Any = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> str:
        return "executed"

    def sample_tokens(self, grammar: Any) -> Any:
        return self.output

    def _dummy_run(self, rows: int) -> int:
        return rows


def hooked(*, armed: bool = True) -> tuple[Runner, StepHooks, list[Any]]:
    guard, runner = Recorder(), Runner()
    hooks = StepHooks(guard)  # type: ignore[arg-type]
    hooks.install(runner)
    hooks.armed = armed
    return runner, hooks, guard.calls


def new_request(req_id: str, prompt: list[int] | None, extra: Any) -> Any:
    params = None if extra == "none" else SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        req_id=req_id, prompt_token_ids=prompt, sampling_params=params, lora_request=None
    )


def scheduled(*new: Any, finished: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=list(new))


def test_requests_that_ended_are_freed_before_new_ones_are_taken_in() -> None:
    runner, _, calls = hooked()
    step = scheduled(
        new_request("a", [1, 2, 3], {"moe_guard_enforce": ["p"], "other": 1}),
        new_request("b", None, None),
        new_request("c", [1], "none"),
        finished=("y", "z"),
    )

    assert runner.execute_model(step) == "executed"
    assert calls == [
        ("finish", "y", "z"),
        ("add", "a", 3, ("p",)),
        ("add", "b", 0, ()),
        ("add", "c", 1, ()),
        "idle",
    ]


def test_a_guard_that_is_idle_is_not_told_to_be() -> None:
    runner, hooks, calls = hooked()
    hooks.guard.is_idle = True
    runner.execute_model(scheduled())
    assert calls == []
    hooks.guard.is_idle = False
    runner.execute_model(scheduled())
    assert calls == ["idle"]


def test_until_it_is_armed_nothing_counts_and_masks_of_the_proof_stay() -> None:
    runner, _, calls = hooked(armed=False)
    runner.execute_model(scheduled(new_request("a", [1], None)))
    assert runner._dummy_run(4) == 4
    assert calls == []


def test_dummy_runs_are_idle() -> None:
    runner, _, calls = hooked()
    assert runner._dummy_run(4) == 4
    runner.execute_model(scheduled(new_request("a", [1], None)), dummy_run=True)
    assert calls == ["idle"]


def test_the_report_of_this_step_and_of_no_other_travels_with_the_output() -> None:
    runner, hooks, _ = hooked()
    stock = Runner.sample_tokens

    def sample(grammar: Any) -> Any:
        hooks.pending = REPORT
        return stock(runner, grammar)

    assert not hasattr(runner.sample_tokens(None), REPORT_ATTRIBUTE)
    other, other_hooks, _ = hooked()
    del other.sample_tokens
    other.sample_tokens = sample  # type: ignore[method-assign]
    hooks.armed = True
    assert (
        getattr(with_report(other.sample_tokens(None), hooks.pending, hooks.guard), REPORT_ATTRIBUTE)
        is REPORT
    )
    hooks.pending = REPORT
    runner.output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    assert not hasattr(runner.sample_tokens(None), REPORT_ATTRIBUTE), "that one was not this step's"
    assert other_hooks.pending is None


def guard() -> Any:
    return SimpleNamespace(failures=Failures(), program=SimpleNamespace(revision="rev"))


def test_a_readback_that_fails_is_reported_once_as_a_step_that_was_not_judged() -> None:
    class Broken(Readback):
        def __init__(self) -> None:
            self.req_ids, self.revision = ("a",), "rev"

        def result(self) -> Any:
            raise RuntimeError("lost")

    holder = guard()
    output = with_report(ModelRunnerOutput(req_ids=[], req_id_to_index={}), Broken(), holder)

    report: StepReport = getattr(output, REPORT_ATTRIBUTE)
    assert report.failed
    assert report.req_ids == ("a",)
    assert report.failures == {"readback": 1}
    assert holder.failures.take() == {}


@pytest.mark.parametrize(
    ("faults", "failed"), [("", False), ("readback@1", True), ("readback@2", False)]
)
def test_a_report_that_is_at_hand_travels_but_can_be_lost_in_a_drill(
    faults: str, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(runner: Runner, grammar: Any) -> Any:
        hooks.pending = packed(report(Row("a")))
        return runner.output

    monkeypatch.setattr(Runner, "sample_tokens", sample)
    runner, hooks, _ = hooked()
    hooks.guard.program = SimpleNamespace(revision="rev")  # type: ignore[assignment]
    with drilling(faults) if faults else nullcontext():
        output = runner.sample_tokens(None)
    assert output is runner.output
    assert getattr(output, REPORT_ATTRIBUTE).failed is failed


class Later(AsyncModelRunnerOutput):  # type: ignore[misc]
    detail = "kept"

    def get_output(self) -> Any:
        return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})


def test_an_output_still_on_its_way_brings_the_report_when_it_arrives() -> None:
    later = with_report(Later(), REPORT, guard())

    assert isinstance(later, AsyncModelRunnerOutput)
    assert later.detail == "kept"
    assert getattr(later.get_output(), REPORT_ATTRIBUTE) is REPORT


def test_without_a_report_or_an_output_nothing_is_touched() -> None:
    output = Later()
    assert with_report(output, None, guard()) is output
    assert with_report(None, REPORT, guard()) is None


def test_a_wrapped_method_is_the_instances_alone() -> None:
    first, second = Runner(), Runner()
    wrap(first, "_dummy_run", lambda stock, rows: stock(rows) + 1)

    assert (first._dummy_run(1), second._dummy_run(1)) == (2, 1)
    with pytest.raises(UnsupportedHostError, match="no_such_method"):
        wrap(first, "no_such_method", lambda stock: None)


class Owner:
    def method(self, value: int) -> int:
        return value


def _ten_times(stock: Callable[[int], int], value: int) -> int:
    return 10 * stock(value)


def test_a_hook_is_there_while_it_hangs_and_leaves_nothing_behind() -> None:
    owner = Owner()
    hook = Hook(owner, "method", _ten_times)
    assert owner.method(7) == 7
    with hook.hung():
        assert owner.method(7) == 70
    assert owner.method(7) == 7
    with pytest.raises(KeyError), hook.hung():
        raise KeyError
    assert vars(owner) == {}


def test_a_hook_goes_through_what_somebody_else_hung_there_and_leaves_it() -> None:
    owner = Owner()
    owner.method = others = lambda value: value + 1  # type: ignore[method-assign]
    with Hook(owner, "method", _ten_times).hung():
        assert owner.method(7) == 80
    assert owner.method is others


class Timed(Recorder):
    """Its steps take their time."""

    program = SimpleNamespace(revision="rev")

    def __init__(self, pending: Any) -> None:
        super().__init__()
        self.pending = pending

    def count_step(self) -> None: ...

    def begin_step_uncaught(self, *_: Any) -> bool:
        time.sleep(0.02)
        return True

    def end_step(self, _: Any) -> Any:
        time.sleep(0.01)
        return self.pending


class Slow(Readback):
    def __init__(self) -> None:
        self.req_ids, self.revision = ("a",), "rev"

    def result(self) -> StepReport:
        return replace(REPORT, host=self.host)


@pytest.mark.parametrize("pending", [Slow(), REPORT], ids=["judged", "failed"])
def test_the_host_time_of_a_step_travels_with_its_report(pending: Any) -> None:
    hooks = StepHooks(Timed(pending))  # type: ignore[arg-type]
    rows = torch.zeros(2, dtype=torch.int64)
    hooks.begin_step(lambda rows: (["a"], rows, rows, 1, None), rows, ["a"])
    hooks.end_step()
    output = with_report(
        ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}), hooks.pending, hooks.guard
    )
    host = getattr(output, REPORT_ATTRIBUTE).host
    assert host.begin > 0.019
    assert host.end > 0.009
    assert REPORT.host is None, "a report that is another's stays as it is"


def test_a_step_with_nothing_to_decide_has_no_report_and_no_time() -> None:
    hooks = StepHooks(Timed(None))  # type: ignore[arg-type]
    hooks.end_step()
    assert hooks.pending is None


class Untold:
    """V1's runner, of a release in which a step's rows are elsewhere."""

    def execute_model(self, scheduler_output: Any) -> None: ...

    def sample_tokens(self, grammar: Any) -> None: ...

    def _dummy_run(self, rows: int) -> None: ...

    def _prepare_inputs(self, scheduler_output: Any) -> str:
        return "prepared"

    def _sample(self, logits: Any, drafts: Any) -> str:
        return "sampled"


class Told(Untold):
    """One whose steps have a row of request `a`."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(num_reqs=1, req_ids=["a"])
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, 1], dtype=torch.int32))
        self.positions = torch.zeros(1, dtype=torch.int64)


def test_a_step_whose_rows_are_not_told_is_one_that_failed() -> None:
    runner, engine = Untold(), Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", 1)
    hooks = hook_runner(runner, engine.guard, is_v2=False)
    hooks.armed = True
    step = SimpleNamespace(num_scheduled_tokens={"a": 1}, total_num_scheduled_tokens=1)
    assert runner._prepare_inputs(step) == "prepared"
    assert runner._sample(None, None) == "sampled"
    report = hooks.pending
    assert isinstance(report, StepReport)
    assert report.failed
    assert (report.req_ids, report.failures) == (("a",), {"begin_step": 1})
    assert not engine.step({"a": (0, [OTHER])}).failed


@pytest.mark.parametrize("fault", ["", "begin_step@2", "begin_step@14"])
def test_steps_are_checked_in_the_same_order_whichever_could_not_be_begun(fault: str) -> None:
    runner, engine = Told(), Engine(policy_text(rule_text(COUNT)))
    engine.guard.add_request("a", 1)
    hooks = hook_runner(runner, engine.guard, is_v2=False)
    hooks.armed = True
    step = SimpleNamespace(num_scheduled_tokens={"a": 1}, total_num_scheduled_tokens=1)
    checked = []
    with drilling(fault) if fault else nullcontext():
        for number in range(2 * CHECK_EVERY_STEPS + 1):
            runner.positions.fill_(number)
            engine.guard.idle()
            runner._prepare_inputs(step)
            runner._sample(None, None)
            assert hooks.pending is not None
            report = opened(hooks.pending, engine.guard)
            checked += [number] if report.check is not None or report.failed else []
    faulty = {int(fault.partition("@")[2]) - 1} if fault else set()
    assert set(checked) == {0, CHECK_EVERY_STEPS, 2 * CHECK_EVERY_STEPS} | faulty


def block_news(serial: int, *handed_out: int, **others: Any) -> Any:
    facts: dict[str, Any] = {
        "scheduled_new_reqs": [],
        "scheduled_cached_reqs": SimpleNamespace(resumed_req_ids=set()),
        NEWS_ATTRIBUTE: BlockNews(serial, handed_out),
    }
    return SimpleNamespace(**facts | others)


@pytest.mark.parametrize(
    "step",
    [
        block_news(1, 4),
        block_news(2),
        block_news(1, **{NEWS_ATTRIBUTE: None}),
        block_news(1, scheduled_new_reqs=["a"]),
        block_news(1, scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"a"})),
        block_news(1, kv_cache_block_copies=[(1, 2)]),
    ],
    ids=["handed out", "one is missing", "no news", "new", "resumed", "copied"],
)
def test_only_a_step_in_which_blocks_are_merely_filled_passes(step: Any) -> None:
    prefixes = PrefixEvidence(None, None, 0)  # type: ignore[arg-type]
    assert not prefixes.passes(step)
    assert prefixes.passes(block_news(1)), "nothing was taken of the other one"
    assert prefixes.passes(block_news(2))
    assert not prefixes.passes(block_news(2))
