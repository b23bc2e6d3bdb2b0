"""What both model runners share: requests in and out, dummy runs, and the report with the output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from guard import fault_injection
from guard.device.readback import Readback
from guard.failures import Stage
from guard.program.step_report import HostSeconds, PackedReport, StepReport
from guard.record.recorder import TraceRecorder
from guard.runtime import Guard
from guard_vllm.compat import seam
from guard_vllm.prefix_evidence import PrefixEvidence
from guard_vllm.request_facts import facts_of

REPORT_ATTRIBUTE = "moe_guard_report"
ENDS_ATTRIBUTE = "moe_guard_ends"
"""Of a scheduler's output, where requests are recorded: how many positions of ended ones count."""


StepRows = tuple[Sequence[str], torch.Tensor, torch.Tensor, int, torch.Tensor | None]
"""Of a step, the arguments of `Guard.begin_step_uncaught`."""


class StepHooks:
    """Hooks on one model runner. Until `armed`, every forward is a dummy one and counts nothing."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.armed = False
        self.pending: Readback | PackedReport | StepReport | None = None
        self.prefixes: PrefixEvidence | None = None
        self.recorder: TraceRecorder | None = None
        self._begin_s = 0.0

    def install(self, runner: Any) -> None:
        """Wrap the parts that the runners have in common."""
        wrap(runner, "execute_model", self._execute_model)
        wrap(runner, "sample_tokens", self._sample_tokens)
        wrap(runner, "_dummy_run", self._dummy_run)

    def _execute_model(self, stock: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.armed or kwargs.get("dummy_run"):
            return stock(scheduler_output, *args, **kwargs)
        prefixes = self.prefixes
        if (
            scheduler_output.finished_req_ids
            or scheduler_output.scheduled_new_reqs
            or self.recorder is not None
            or (prefixes is not None and not prefixes.passes(scheduler_output))
        ):
            self.admit(scheduler_output)
        if not self.guard.is_idle:
            self.guard.idle()  # until this step's rows are known
        return stock(scheduler_output, *args, **kwargs)

    def _sample_tokens(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        self.pending = None
        return self._with_pending(stock(*args, **kwargs))

    def _with_pending(self, output: Any) -> Any:
        """The runner's output with the report that `end_step` left in between."""
        pending = self.pending
        if (
            isinstance(pending, PackedReport)
            and type(output) is ModelRunnerOutput
            and fault_injection.drill is None
        ):  # in most steps: it is at hand, and nothing can fail
            setattr(output, REPORT_ATTRIBUTE, pending)
            return output
        return with_report(output, pending, self.guard)

    def _dummy_run(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        if self.armed:
            self.guard.idle()
        return stock(*args, **kwargs)

    def begin_step(self, rows_of: Callable[[Any], StepRows], step: Any, req_ids: Iterable[str]) -> None:
        """Begin a step of these requests. rows_of: says which rows the runner gave this step"""
        began = time.perf_counter()
        guard = self.guard
        guard.count_step()
        if not guard.failures.tried(Stage.BEGIN_STEP, self._begin_step, rows_of, step):
            guard.give_up_step(req_ids)
        self._begin_s = time.perf_counter() - began

    def _begin_step(self, rows_of: Callable[[Any], StepRows], step: Any) -> bool:
        rows = rows_of(step)
        self.guard.begin_step_uncaught(*rows)
        if self.recorder is not None:
            req_ids, query_start_B1, position_T, num_rows, _ = rows
            self.recorder.begin_step(req_ids, query_start_B1[: len(req_ids) + 1], position_T[:num_rows])
        return True

    def end_step(self, rejected_B: torch.Tensor | None = None) -> None:
        began = time.perf_counter()
        if self.recorder is not None:
            self.recorder.end_step(rejected_B)
        self.pending = pending = self.guard.end_step(rejected_B)
        end_s = time.perf_counter() - began
        if isinstance(pending, PackedReport):
            pending.begin_s, pending.end_s = self._begin_s, end_s
        elif isinstance(pending, Readback):
            pending.host = HostSeconds(self._begin_s, end_s)
        elif pending is not None:
            self.pending = replace(pending, host=HostSeconds(self._begin_s, end_s))

    def admit(self, scheduler_output: Any) -> None:
        if scheduler_output.finished_req_ids:
            self.guard.finish_requests(scheduler_output.finished_req_ids)
        if self.recorder is not None:
            with self.guard.failures.caught(Stage.RECORD):
                self._admit_to_trace(self.recorder, scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self.guard.add_request(
                request.req_id,
                len(request.prompt_token_ids or ()),
                facts_of(request.req_id, request.sampling_params, request.lora_request),
            )
        if self.prefixes is not None:
            with self.guard.failures.caught(Stage.ADMIT) as attempt:
                self.prefixes.admit(scheduler_output)
            if attempt.failed:
                with self.guard.failures.caught(Stage.ADMIT):
                    self.prefixes.lose_track()

    def _admit_to_trace(self, recorder: TraceRecorder, scheduler_output: Any) -> None:
        ends = getattr(scheduler_output, ENDS_ATTRIBUTE, None)
        recorder.finish_requests(scheduler_output.finished_req_ids, ends)
        for request in scheduler_output.scheduled_new_reqs:
            recorder.add_request(request.req_id, len(request.prompt_token_ids or ()))


def with_report(output: Any, pending: Readback | PackedReport | StepReport | None, guard: Guard) -> Any:
    """The runner's output, which carries what the guard decided in the same step."""
    if pending is None or output is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _ReportingOutput(output, pending, guard)
    assert isinstance(output, ModelRunnerOutput)
    report: PackedReport | StepReport
    with guard.failures.caught(Stage.READBACK) as attempt:
        report = pending.result() if isinstance(pending, Readback) else pending
    if attempt.failed:
        faults = guard.failures.take()
        report = StepReport.of_failed_step(pending.revision, pending.req_ids, faults)
        report = replace(report, host=pending.host)
    setattr(output, REPORT_ATTRIBUTE, report)
    return output


class _ReportingOutput(AsyncModelRunnerOutput):
    """An output that is still on its way; the guard's report is waited for together with it."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        pending: Readback | PackedReport | StepReport,
        guard: Guard,
    ) -> None:
        self._output = output
        self._pending = pending
        self._guard = guard

    def get_output(self) -> ModelRunnerOutput:
        return with_report(self._output.get_output(), self._pending, self._guard)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of one instance by `around(stock, *args, **kwargs)`."""
    setattr(owner, name, partial(around, seam(owner, name)))


class Hook:
    """`wrap`, for a method that is called too often to go through it when there is nothing to do."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._hooked = partial(around, seam(owner, name))

    @contextmanager
    def hung(self) -> Iterator[None]:
        stock = vars(self._owner).get(self._name)  # somebody else's, if there is one
        setattr(self._owner, self._name, self._hooked)
        try:
            yield
        finally:
            if stock is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, stock)
