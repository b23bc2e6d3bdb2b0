"""Pipeline parallelism, on Model Runner V2: each rank loads and routes some of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from guard.device.pipeline import PipelineStage, StageEvidence
from guard.errors import UnsupportedHostError
from guard.program.topology import MoELayer
from guard.staged import StagedGuard
from guard_vllm.compat import seam
from guard_vllm.steps import StepHooks, wrap

EVIDENCE_KEY, FINDINGS_KEY = "moe_guard_evidence", "moe_guard_findings"
"""In the tensors that a rank sends on. Model Runner V2 takes out of them the keys that it knows."""


def pipeline_size() -> int:
    size: int = _group().world_size
    return size


def layers_of_pipeline(own: Sequence[MoELayer]) -> tuple[MoELayer, ...]:
    """The MoE layers of all ranks, by number. Every rank must call it, at the same point."""
    group = _group()
    if group.world_size == 1:
        return tuple(own)
    gathered: list[Any] = [None] * group.world_size
    dist.all_gather_object(gathered, tuple(own), group=group.cpu_group)
    layers = sorted((layer for part in gathered for layer in part), key=lambda layer: layer.number)
    numbers = [layer.number for layer in layers]
    if len(set(numbers)) != len(numbers):
        raise UnsupportedHostError(f"several ranks of the pipeline have the same MoE layer: {numbers}")
    return tuple(layers)


def make_stage(layers: Sequence[int]) -> PipelineStage:
    """This rank's place. Every rank must call it, at the same point: it makes a group of ranks, so
    that what the guard says to another rank never waits behind hidden states."""
    group = _group()
    own_group = group.make_sibling_device_group(group_desc="moe_guard")
    return PipelineStage(layers, group.rank_in_group, group.world_size, own_group)


def hook_pipeline(runner: Any, guard: StagedGuard, hooks: StepHooks) -> None:
    """Around what `StepHooks` and the runner's own hooks do."""
    intermediate_tensors_type = seam("vllm.sequence", "IntermediateTensors")
    batches: list[Any] = []  # the batch of the step under way, if it has one

    def prepare_inputs(stock: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(*args, **kwargs)
        if hooks.armed:
            batches.append(batch)
        return batch

    def execute_model(
        stock: Any, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        batches.clear()
        output = stock(scheduler_output, intermediate_tensors, *args, **kwargs)
        if not batches:
            return output
        [batch] = batches
        earlier = {} if intermediate_tensors is None else intermediate_tensors.tensors
        evidence = guard.evidence(batch.num_tokens, batch.num_reqs, _received(earlier))
        if evidence is None or not isinstance(output, intermediate_tensors_type):
            return output
        # A new object: a captured graph returns the same one at every replay.
        return intermediate_tensors_type({**output.tensors, **_sent(evidence)})

    def sample_tokens(stock: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if batches:
            [batch] = batches
            batches.clear()
            ends = batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
            guard.expect_decisions(
                batch.req_ids,
                batch.query_start_loc[: batch.num_reqs + 1],
                batch.positions[: batch.num_tokens],
                {req_id for req_id, samples in zip(batch.req_ids, ends, strict=True) if samples},
            )
        return output

    wrap(runner, "prepare_inputs", prepare_inputs)
    wrap(runner, "execute_model", execute_model)
    if not guard.stage.is_last:
        wrap(runner, "sample_tokens", sample_tokens)


def _received(tensors: Mapping[str, Any]) -> StageEvidence | None:
    rows_TY = tensors.get(EVIDENCE_KEY)
    return None if rows_TY is None else StageEvidence(rows_TY, tensors.get(FINDINGS_KEY))


def _sent(evidence: StageEvidence) -> dict[str, Any]:
    tensors = {EVIDENCE_KEY: evidence.rows_TY}
    if evidence.findings_N is not None:
        tensors[FINDINGS_KEY] = evidence.findings_N
    return tensors


def _group() -> Any:
    return seam("vllm.distributed.parallel_state", "get_pp_group")()
