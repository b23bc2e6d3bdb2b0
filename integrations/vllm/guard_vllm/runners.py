"""The two model runners: where each knows the rows of a step, and which of them were accepted."""

from __future__ import annotations

from typing import Any

from guard.runtime import Guard
from guard_vllm.steps import StepHooks, wrap


def hook_runner(runner: Any, guard: Guard, *, is_v2: bool) -> StepHooks:
    """Hook one model runner instance; nothing of vLLM's classes changes."""
    hooks = StepHooks(guard)
    hooks.install(runner)
    if is_v2:
        _hook_v2(runner, hooks)
    else:
        _hook_v1(runner, hooks)
    return hooks


def _hook_v2(runner: Any, hooks: StepHooks) -> None:
    def prepare_inputs(stock: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(*args, **kwargs)
        if hooks.armed:
            # On the device: under adaptive verification the host does not know the rows.
            hooks.guard.begin_step(
                batch.req_ids,
                batch.query_start_loc[: batch.num_reqs + 1],
                batch.positions[: batch.num_tokens],
            )
        return batch

    def sample(stock: Any, *args: Any, **kwargs: Any) -> Any:
        sampler_output, num_sampled, num_rejected = stock(*args, **kwargs)
        if hooks.armed:
            hooks.pending = hooks.guard.end_step(num_rejected)
        return sampler_output, num_sampled, num_rejected

    wrap(runner, "prepare_inputs", prepare_inputs)
    wrap(runner, "sample", sample)


def _hook_v1(runner: Any, hooks: StepHooks) -> None:
    def prepare_inputs(stock: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = stock(scheduler_output, *args, **kwargs)
        if hooks.armed:
            num_reqs = runner.input_batch.num_reqs
            hooks.guard.begin_step(
                runner.input_batch.req_ids[:num_reqs],
                runner.query_start_loc.gpu[: num_reqs + 1],
                runner.positions[: scheduler_output.total_num_scheduled_tokens],
            )
        return prepared

    def sample(stock: Any, *args: Any, **kwargs: Any) -> Any:
        sampler_output = stock(*args, **kwargs)
        if hooks.armed:
            hooks.pending = hooks.guard.end_step()
        return sampler_output

    wrap(runner, "_prepare_inputs", prepare_inputs)
    wrap(runner, "_sample", sample)
