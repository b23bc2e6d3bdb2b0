"""A process with one or several vLLM engines, which take turns.

Started by `runs.py`. Reads a JSON job from its first argument, then a JSON line for each workload from
standard input; answers each with a JSON line for each slice, on the descriptor that the job names.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

WARM_UP_STEPS = 5


class TurnClock:
    """`time.monotonic` of engines that take turns: each one's stands still while others have theirs.
    What the guard does every so many milliseconds would come in every step otherwise."""

    def __init__(self, real: Callable[[], float] = time.monotonic) -> None:
        self._real = real
        self._passed_s: dict[object, float] = {}
        self._whose: object = None
        self._since = real()

    def __call__(self) -> float:
        return self._passed_s.get(self._whose, 0.0) + self._real() - self._since

    def turn_to(self, whose: object) -> None:
        self._passed_s[self._whose] = self()
        self._whose, self._since = whose, self._real()


class Batches:
    """An engine, and the requests that it serves. clock: of which each method takes a turn"""

    def __init__(self, job: dict[str, Any], clock: TurnClock) -> None:
        from vllm import LLM

        self._clock = clock
        self._take_turn()

        os.chdir(job["folder"])  # all paths are the same in it, so that compiled graphs are used again
        self._job = job
        self._engine = LLM(
            model=job["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=job["dtype"],
            seed=0,
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=2048,
            disable_log_stats=True,
            additional_config=job["additional_config"],
            **job["arguments"],
        ).llm_engine
        self._numbers = itertools.count()
        self._decoding: list[str] = []

    def _take_turn(self) -> None:
        self._clock.turn_to(self)

    @property
    def core(self) -> Any:
        """vLLM's engine core, which is in this process."""
        return self._engine.engine_core.engine_core

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.core.model_executor.driver_worker.worker.model_runner.get_model()
        return model

    def begin_decoding(self, order: dict[str, Any], masks: list[str | None]) -> None:
        """Begin a batch, and go on until all of it are decoding."""
        self._take_turn()
        self._decoding = self._add(
            order, masks, self._job["max_model_len"] - order["prompt_tokens"] - 1
        )
        waiting = set(self._decoding)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs}

    def decode(self) -> float:
        """Seconds of one step of it."""
        self._take_turn()
        began = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - began

    def end_decoding(self) -> None:
        self._take_turn()
        self._engine.abort_request(self._decoding)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def prefill(self, order: dict[str, Any], masks: list[str | None]) -> list[float]:
        """Seconds from when all requests came to each one's first token."""
        self._take_turn()
        began = time.perf_counter()
        waiting = set(self._add(order, masks, 1))
        seconds = []
        while waiting:
            done = {output.request_id for output in self._engine.step() if output.outputs}
            seconds += [time.perf_counter() - began] * len(done & waiting)
            waiting -= done
        return seconds

    def _add(self, order: dict[str, Any], masks: list[str | None], tokens: int) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        length = order["prompt_tokens"]
        req_ids = []
        for nth in range(order["concurrency"]):
            mask = masks[nth % len(masks)]
            number = next(self._numbers)
            params = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                extra_args={"moe_guard_labels": {"mask": mask}} if mask else None,
            )
            # No prompt is like another one, so that prefixes are kept, but none is found.
            prompt = {"prompt_token_ids": [3 + (number + 5 * j * j) % 30_000 for j in range(length)]}
            self._engine.add_request(str(number), prompt, params)
            req_ids.append(str(number))
        return req_ids


def slices(engines: Mapping[str, Any], order: dict[str, Any]) -> Iterator[dict[str, list[float]]]:
    """For each slice, the seconds of each state.

    engines: `Batches` by state; order: `workload`, `masks` by state, `slices`, `steps`, `seed`

    Decoding: the states take turns step by step, in an order drawn anew for each step, each with a
    batch that lasts for all slices. So what disturbs the machine for longer than a step disturbs all
    states, and all have read the same number of tokens before.
    """
    draw, states = random.Random(order["seed"]), list(order["masks"])

    def turns() -> list[str]:
        return draw.sample(states, len(states))

    if order["workload"] == "prefill":
        for number in range(order["slices"] + 1):
            took = {name: engines[name].prefill(order, order["masks"][name]) for name in turns()}
            if number:  # the first one warms up
                yield took
        return
    for name in states:
        engines[name].begin_decoding(order, order["masks"][name])
    for _ in range(WARM_UP_STEPS):
        for name in turns():
            engines[name].decode()
    for _ in range(order["slices"]):
        seconds: dict[str, list[float]] = {name: [] for name in states}
        for _ in range(order["steps"]):
            for name in turns():
                seconds[name].append(engines[name].decode())
        yield seconds
    for name in states:
        engines[name].end_decoding()


def share_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let `model` read the weights of `other`, which are the same numbers. Where weights lie in memory
    decides how fast they are read, by more than what is measured here."""
    weights = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        parameter.data = weights[name].data
    packed = dict(_packed_weights(other))
    for name, handler in _packed_weights(model):
        handler.dtor(handler.handler_tensor.item())
        handler.handler_tensor.copy_(packed[name].handler_tensor)
        handler.dtor = _not_mine


def _packed_weights(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """vLLM's handlers of dense weights that oneDNN keeps in a form of its own, by the layer's name; a
    graph reads the handler's address from a tensor."""
    for name, module in model.named_modules():
        for cell in getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ():
            if isinstance(getattr(cell.cell_contents, "handler_tensor", None), torch.Tensor):
                yield name, cell.cell_contents


def _not_mine(_: int) -> None:
    """The other model's handler releases them."""


def started(jobs: list[dict[str, Any]], clock: TurnClock) -> Iterator[tuple[str, Batches]]:
    """The engines by name. Those without the plugin come before it is loaded: it wraps constructors."""
    assert jobs == sorted(jobs, key=lambda job: job["plugin"])
    first: Batches | None = None
    for job in jobs:
        if job["plugin"]:
            from guard_vllm.plugin import register

            register()
        engine = Batches(job, clock)
        if first is None:
            first = engine
        else:
            share_weights(engine.model, first.model)
        yield job["name"], engine


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(job["answers_fd"], "w", buffering=1)
    engines = {}
    clock = TurnClock()
    time.monotonic = clock
    for name, engine in started(job["engines"], clock):
        engines[name] = engine
        answers.write(json.dumps({"ready": name}) + "\n")
    for line in sys.stdin:
        for seconds in slices(engines, json.loads(line)):
            answers.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
