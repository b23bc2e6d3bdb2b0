"""The two model runners: where each knows the rows of a step, and which of them were accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from guard.failures import Stage
from guard.runtime import Guard
from guard_vllm.compat import seam
from guard_vllm.steps import StepHooks, StepRows, wrap


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
    def rows_of(batch: Any) -> StepRows:
        # On the device: under adaptive verification the host does not know the rows.
        return batch.req_ids, batch.query_start_loc, batch.positions, batch.num_tokens, None

    def prepare_inputs(stock: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(*args, **kwargs)
        if hooks.armed:
            hooks.begin_step(rows_of, batch, batch.req_ids)
        return batch

    def prepare_attn(stock: Any, *args: Any, **kwargs: Any) -> Any:
        block_tables, slot_mappings = stock(*args, **kwargs)
        if hooks.armed and hooks.prefixes is not None:
            with hooks.guard.failures.caught(Stage.BEGIN_STEP):
                hooks.guard.place_rows(slot_mappings[hooks.prefixes.group])
        return block_tables, slot_mappings

    def sample(stock: Any, *args: Any, **kwargs: Any) -> Any:
        sampler_output, num_sampled, num_rejected = stock(*args, **kwargs)
        if hooks.armed:
            hooks.end_step(num_rejected)
        return sampler_output, num_sampled, num_rejected

    wrap(runner, "prepare_inputs", prepare_inputs)
    wrap(runner, "prepare_attn", prepare_attn)
    wrap(runner, "sample", sample)


def _hook_v1(runner: Any, hooks: StepHooks) -> None:
    def rows_of(scheduler_output: Any) -> StepRows:
        batch, prefixes = runner.input_batch, hooks.prefixes
        return (
            batch.req_ids[: batch.num_reqs],
            runner.query_start_loc.gpu,
            runner.positions,
            scheduler_output.total_num_scheduled_tokens,
            None if prefixes is None else batch.block_table[prefixes.group].slot_mapping.gpu,
        )

    def prepare_inputs(stock: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = stock(scheduler_output, *args, **kwargs)
        if hooks.armed:
            hooks.begin_step(rows_of, scheduler_output, scheduler_output.num_scheduled_tokens)
        return prepared

    def sample(stock: Any, logits: Any, drafts: Any, *args: Any, **kwargs: Any) -> Any:
        sampler_output = stock(logits, drafts, *args, **kwargs)
        if hooks.armed:
            rejected_B = None
            if drafts is not None:
                rejected_B = _num_rejected(
                    sampler_output.sampled_token_ids,
                    drafts.cu_num_draft_tokens,
                    runner.input_batch.vocab_size,
                )
            hooks.end_step(rejected_B)
        return sampler_output

    wrap(runner, "_prepare_inputs", prepare_inputs)
    wrap(runner, "_sample", sample)


def _num_rejected(
    sampled_ids_BJ: torch.Tensor, cu_drafts_B: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """int64 [B] draft tokens that were not accepted: a request gets one token more than it accepts,
    and the places of the others hold an id that is none (-1)."""
    num_drafts_B = cu_drafts_B.diff(prepend=cu_drafts_B.new_zeros(1))
    is_token_BJ = (sampled_ids_BJ >= 0) & (sampled_ids_BJ < vocabulary)
    num_accepted_B = (is_token_BJ.sum(dim=1) - 1).clamp(min=0)
    return num_drafts_B - num_accepted_B


def run_probe_rows(runner: Any, rows: int, *, is_v2: bool, uniform_decode: bool) -> None:
    """Run dummy rows that the routers take for real ones.

    uniform_decode: as one-token requests, the shape of full CUDA graphs
    """
    with _no_row_is_padding(runner, is_v2=is_v2):
        runner._dummy_run(rows, uniform_decode=uniform_decode)


@contextmanager
def _no_row_is_padding(runner: Any, *, is_v2: bool) -> Iterator[None]:
    """vLLM marks dummy rows as padding, and on CUDA its routers give those no expert at all."""
    owner, name = (
        (seam("vllm.v1.worker.gpu.model_runner", "InputBatch"), "make_dummy")
        if is_v2
        else (runner, "_prepare_padding_mask")
    )
    if not hasattr(owner, name):  # V1 before vLLM 0.32 marks no row
        yield
        return
    stock, own = getattr(owner, name), owner.__dict__.get(name)

    def unmarked(*args: Any, **kwargs: Any) -> Any:
        made = stock(*args, **kwargs)
        (made.is_padding if is_v2 else made).fill_(False)
        return made

    setattr(owner, name, unmarked)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
