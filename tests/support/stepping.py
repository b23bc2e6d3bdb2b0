"""Steps an offline engine by hand, so that requests arrive and are cancelled at a chosen moment.

For engines whose core runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`). A request of a job, as
in `engine_run`, may have besides:

    "arrives": the step before which it is added; 0 where not given
    "priority": for scheduling by priority, the least first
    "cancel": {"in": a state of `STATES`, "tokens": that its client has by then, 0 where not given}, or
        {"at_decision": [batch, number, rule]}: cancelled while the step is under way at which that
        request of an earlier batch, the same but for this, had its decision
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from vllm.v1.request import Request, RequestStatus

MAX_STEPS = 5_000

_numbers = itertools.count()


def _is_in_prompt(request: Request) -> bool:
    known: int = request.num_computed_tokens - request.num_in_flight_tokens
    return known > 0 and bool(request.num_computed_tokens < request.num_prompt_tokens)


STATES: dict[str, Callable[[Request], bool]] = {
    "waiting": lambda request: request.status == RequestStatus.WAITING,
    "prompt": lambda request: request.status == RequestStatus.RUNNING and _is_in_prompt(request),
    "output": lambda request: request.status == RequestStatus.RUNNING and request.num_output_tokens > 0,
    "preempted": lambda request: request.status == RequestStatus.PREEMPTED,
}


class SteppedBatch:
    """The requests of one batch, from the first one's arrival until the engine forgot the last."""

    def __init__(
        self,
        llm: Any,
        requests: list[dict[str, Any]],
        make_params: Callable[[dict[str, Any]], Any],
        fires_after: Callable[[list[Any]], int],
        after_step: Callable[[], Any],
        before_step: Callable[[int], Any] = lambda _: None,
    ) -> None:
        """fires_after: how many tokens a client has as the step of an `at_decision` begins"""
        self._engine = llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._requests = requests
        self._make_params = make_params
        self._fires_after = fires_after
        self._after_step = after_step
        self._before_step = before_step
        self._internal: dict[int, str] = {}
        self._external: dict[int, str] = {}
        self._latest: dict[str, Any] = {}
        self._grammars: dict[int, Any] = {}
        self.cancelled: dict[int, dict[str, Any]] = {}

    def run(self) -> list[Any]:
        """What each request's client has last received, in the order of the requests; None: nothing."""
        last_arrival = max(request.get("arrives", 0) for request in self._requests)
        for step in range(MAX_STEPS):
            self._add(step)
            self._cancel()
            self._before_step(step)
            if step >= last_arrival and not self._engine.has_unfinished_requests():
                break
            self._step()
        else:
            raise AssertionError(f"requests are left after {MAX_STEPS} steps")
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._step()  # the worker hears of requests that ended in the step that comes
        return [self._latest.get(external) for external in self.external_ids()]

    def num_in_grammar(self, number: int) -> int | None:
        """Tokens by which a request's grammar has advanced, if it has one."""
        asked = self._grammars.get(number)
        return None if asked is None else int(asked.grammar.num_processed_tokens)

    def external_ids(self) -> list[str]:
        return [self._external[i] for i in range(len(self._requests))]

    def _add(self, step: int) -> None:
        for number, request in enumerate(self._requests):
            if request.get("arrives", 0) == step:
                prompt = {"prompt_token_ids": request["prompt"]}
                external = self._external[number] = f"stepped-{next(_numbers)}"
                self._internal[number] = self._engine.add_request(
                    external, prompt, self._make_params(request), priority=request.get("priority", 0)
                )
                added = self._core.scheduler.requests[self._internal[number]]
                if added.structured_output_request is not None:
                    self._grammars[number] = added.structured_output_request

    def _step(self) -> None:
        for output in self._engine.step():
            self._latest[output.request_id] = output
        self._after_step()

    def _cancel(self) -> None:
        for number, asked in enumerate(request.get("cancel") for request in self._requests):
            internal = self._internal.get(number)
            if asked is None or number in self.cancelled or internal is None:
                continue
            request = self._core.scheduler.requests.get(internal)
            if request is None:
                continue
            if "in" in asked:
                due = STATES[asked["in"]](request) and request.num_output_tokens >= asked.get(
                    "tokens", 0
                )
            else:
                due = request.num_output_tokens == self._fires_after(asked["at_decision"])
            if due:
                self.cancelled[number] = self._facts(request)
                external = self._external[number]
                if "in" in asked or self._core.batch_queue is not None:
                    self._engine.abort_request([external])  # beside a step that is scheduled ahead
                else:
                    self._engine.output_processor.abort_requests([external], internal=False)
                    self._core.aborts_queue.put_nowait([internal])  # read behind the forward

    @staticmethod
    def _facts(request: Request) -> dict[str, Any]:
        """status: as it was cancelled; counted: positions of it that the engine core knows computed;
        in_flight: those of a step that is under way."""
        output = request.num_output_tokens
        known = request.num_computed_tokens - request.num_in_flight_tokens
        return {
            "status": request.status.name,
            "counted": request.num_prompt_tokens + output - 1 if output else max(known, 0),
            "in_flight": request.num_in_flight_tokens,
            "num_preemptions": request.num_preemptions,
        }
