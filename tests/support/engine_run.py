"""Runs engines and requests of a JSON job on vLLM's offline `LLM`, and writes what came of them.

    python engine_run.py JOB.json RESULT.json      # $RANK in the latter is that of a launched process

Job: {"engines": [{"name", "engine": arguments of LLM, "config_only": false, "record": false,
"async": false, "beam_search": tried behind the cases, false,
"correction_bias": fills the model by `random_weights`, "kernel": of `routing_kernel`, which vLLM then
has for its experts and no other; "load_seconds": between two questions about their use; all optional,
"cases": [{"name", "batches": [[{"prompt": token ids, "sampling": of SamplingParams,
"continues": [batch, request] whose whole text goes before the prompt, "salt": keeps its KV apart;
optional}]], "before_batch": of each batch a worker method with its arguments, or null; "chunk_tokens":
of each batch the most tokens of a step, for it and those behind it; both optional,
"stepped": true where requests have what `tests.support.stepping` adds; "policies": by step, as text,
the folder of policies that is in force from then on; optional}]}]}.
The batches of a case run one after another; the prefix cache is emptied before each case.

Result: by engine name, "error" or "compile_key" and, by case name, what `run_case` returns. All
floats are in `float.hex`, so that equal means equal to the last bit.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

DELIVERY_SECONDS = 10.0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {}
    for engine in job["engines"]:
        result[engine["name"]] = run_engine(engine)
        gc.collect()  # an engine that goes while another starts would take that one's process groups
    Path(os.path.expandvars(sys.argv[2])).write_text(json.dumps(result))


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        if job.get("config_only"):
            from vllm.engine.arg_utils import EngineArgs

            config = EngineArgs(**job["engine"]).create_engine_config()
            return {"compile_key": config.compute_hash()}
        from vllm import LLM

        from tests.support.async_on_cpu import async_scheduling

        if "correction_bias" in job:
            from tests.support import random_weights

            random_weights.install(*job["correction_bias"])
        recorder = {"worker_extension_cls": _RECORDER} if job.get("record") else {}
        with async_scheduling() if job.get("async") else nullcontext(), kernel(job.get("kernel")):
            llm = LLM(**recorder | job["engine"])
        if "load_seconds" in job:
            from guard_vllm import core_load

            core_load.LOAD_SECONDS = job["load_seconds"]
        start_seconds = round(time.monotonic() - started, 1)
        return {
            "guarded": "guard_vllm.client" in sys.modules,
            "plugged": "guard_vllm" in sys.modules,
            "start_seconds": start_seconds,
            "cases": {case["name"]: run_case(llm, case, job.get("record")) for case in job["cases"]},
            "beam_search": try_beam_search(llm) if job.get("beam_search") else None,
            "seconds": round(time.monotonic() - started, 1),
        }
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test looks at
        # The error of a start that failed in another process is in that process's log only.
        return {"error": "".join(traceback.format_exception(error))}


def kernel(name: str | None) -> AbstractContextManager[None]:
    if name is None:
        return nullcontext()
    from tests.support import routing_kernel

    return routing_kernel.instead_of_vllms(getattr(routing_kernel, name))


def try_beam_search(llm: Any) -> dict[str, Any]:
    """What came of it: the error, or the number of tokens of each beam."""
    from vllm.sampling_params import BeamSearchParams

    try:
        [found] = llm.beam_search([{"prompt_token_ids": [5, 6, 7]}], BeamSearchParams(2, 4))
    except ValueError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"tokens": [beam.tokens for beam in found.sequences]}


_RECORDER = "tests.support.routing_recorder.RoutingRecorder"


def run_case(llm: Any, case: dict[str, Any], record: bool | None) -> dict[str, Any]:
    """batches: outputs of each; decisions, counters: what moved; gauges: the guard's state behind each
    batch; rows: see `RoutingRecorder`; load: the use of experts before and behind the case; shown: of
    the guard, behind it, what is in no counter here."""
    llm.reset_prefix_cache()
    counters, decisions, load = read_counters(), NewDecisions(), read_load(llm)
    if record:
        llm.collective_rpc("start_recording")
    batches: list[list[dict[str, Any]]] = []
    gauges: list[dict[str, float]] = []
    calls = case.get("before_batch", [None] * len(case["batches"]))
    chunks = case.get("chunk_tokens", [None] * len(case["batches"]))
    for requests, call, chunk_tokens in zip(case["batches"], calls, chunks, strict=True):
        if call is not None:
            llm.collective_rpc(call[0], args=tuple(call[1:]))
        if chunk_tokens is not None:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            scheduler.max_num_scheduled_tokens = chunk_tokens
        requests = [prompt_of(request, batches) for request in requests]
        if case.get("stepped"):
            changes = case.get("policies", {})
            batches.append(run_stepped(llm, requests, batches, decisions, changes))
        else:
            batches.append(run_batch(llm, requests))
        gauges.append(read_series("moe_guard_up", "moe_guard_blind_layers"))
    num_requests = sum(
        request["sampling"].get("n", 1) for requests in case["batches"] for request in requests
    )
    moved = wait_for_counters(counters, num_requests)
    return {
        "batches": batches,
        "decisions": [as_json(decision) for decision in decisions.collect()],
        "counters": moved,
        "gauges": gauges,
        "load": [load, read_load(llm)],
        "shown": read_series("moe_guard_layer_", *(f"moe_guard_{name}" for name in _OF_THE_HOST)),
        "rows": llm.collective_rpc("recorded_rows")[0] if record else {},
    }


def prompt_of(request: dict[str, Any], batches: list[list[dict[str, Any]]]) -> dict[str, Any]:
    if "continues" not in request:
        return request
    batch, number = request["continues"]
    earlier = batches[batch][number]
    text = [*earlier["prompt"], *earlier["samples"][0]["tokens"]]
    return request | {"prompt": text + request["prompt"]}


def run_batch(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    outputs = llm.generate(
        [
            {"prompt_token_ids": request["prompt"]}
            | ({"cache_salt": request["salt"]} if "salt" in request else {})
            for request in requests
        ],
        [sampling_params(request) for request in requests],
        use_tqdm=False,
    )
    return [output_json(output) for output in outputs]


def run_stepped(
    llm: Any,
    requests: list[dict[str, Any]],
    earlier: list[list[dict[str, Any]]],
    decisions: NewDecisions,
    policies: dict[str, str],
) -> list[dict[str, Any]]:
    """As `run_batch`, from an empty prefix cache; each request has also the worker's slots and the
    engine core's books behind the batch, and what was known of it as it was cancelled, if it was."""
    from tests.support.stepping import SteppedBatch

    def fires_after(asked: list[Any]) -> int:
        batch, number, rule = asked
        output = earlier[batch][number]
        [position] = [
            decision.position
            for decision in decisions.collect()
            if (decision.request_id, decision.rule) == (output["request_id"], rule)
        ]
        return int(position) - len(output["prompt"]) + 1

    llm.reset_prefix_cache()
    stepped = SteppedBatch(
        llm,
        requests,
        sampling_params,
        fires_after,
        after_step=decisions.collect,
        before_step=lambda step: put_in_force(llm, policies.get(str(step))),
    )
    outputs = stepped.run()
    slots = llm.collective_rpc("slots")[0]
    books = read_books(llm)
    return [
        (output_json(output) if output is not None else nothing_json(request, external_id))
        | {
            "cancelled": stepped.cancelled.get(number),
            "slots": slots,
            "books": books,
            "num_in_grammar": stepped.num_in_grammar(number),
        }
        for number, (request, output, external_id) in enumerate(
            zip(requests, outputs, stepped.external_ids(), strict=True)
        )
    ]


def read_books(llm: Any) -> dict[str, int]:
    """How much an engine core of this process still holds that belongs to some request."""
    core = llm.llm_engine.engine_core.engine_core
    own = core.moe_guard_commit_reload.__self__._take.__self__
    ledger, blocks = own._ledger, own._kv_blocks
    outcomes = ledger._outcomes
    return {
        "outcomes": len(set().union(outcomes._outcome, outcomes._unmasked, outcomes.owed)),
        "masked": len(outcomes.masked_by),
        "missed": ledger.num_forgotten,
        "open": len(ledger._open),
        "blocked": len(own._blocked),
        "holes": 0 if blocks is None else len(blocks._holes),
        "steps under way": 0 if blocks is None else len(blocks._in_flight),
    }


def put_in_force(llm: Any, policies: str | None) -> None:
    if policies is not None:
        from guard_vllm.reload import reload_policies

        result = reload_policies(llm, policies)
        assert result.fault is None, result.fault


def sampling_params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    sampling = dict(request["sampling"])
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
    return SamplingParams(detokenize=False, **sampling)


def output_json(output: Any) -> dict[str, Any]:
    return {
        "request_id": output.request_id,
        "prompt": list(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "prompt_logprobs": len(output.prompt_logprobs or ()),
        "samples": [sample_json(sample) for sample in output.outputs],
    }


def nothing_json(request: dict[str, Any], request_id: str) -> dict[str, Any]:
    """Of a request whose client got nothing."""
    empty: dict[str, Any] = {
        "tokens": [],
        "logprobs": [],
        "finish_reason": "abort",
        "stop_reason": None,
    }
    return {
        "request_id": request_id,
        "prompt": request["prompt"],
        "cached": 0,
        "samples": [empty | {"routed_experts": None}],
    }


def sample_json(sample: Any) -> dict[str, Any]:
    routed = sample.routed_experts
    return {
        "tokens": list(sample.token_ids),
        "logprobs": [
            {str(token): entry.logprob.hex() for token, entry in at.items()}
            for at in sample.logprobs or ()
        ],
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "routed_experts": None if routed is None else routed.tolist(),
    }


def is_guarded() -> bool:
    return "guard_vllm.client" in sys.modules


def read_decisions() -> list[Any]:
    if not is_guarded():
        return []
    from guard_vllm.client import decisions

    return decisions()


class NewDecisions:
    """Those since it was made; the process itself keeps only the latest, so collect often."""

    def __init__(self) -> None:
        self._before = {decision.decision_id for decision in read_decisions()}
        self._new: dict[str, Any] = {}

    def collect(self) -> list[Any]:
        self._new |= {
            decision.decision_id: decision
            for decision in read_decisions()
            if decision.decision_id not in self._before
        }
        return list(self._new.values())


def as_json(decision: Any) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(decision)
    return fields


_OF_THE_HOST = ("steps_total", "host_seconds_total", "load_tokens_total")
"""What depends on how an engine batches, and on time."""


def read_counters() -> dict[str, float]:
    series = read_series("moe_guard_", "vllm:spec_decode_", "vllm:num_preemptions")
    return {
        name: value
        for name, value in series.items()
        if "_total{" in name and not name.startswith(_OF_THE_HOST)
    }


def read_load(llm: Any) -> Any:
    """What an engine core of this process has counted of the use of experts; None: it is no such."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None or not is_guarded() or not hasattr(core, "moe_guard_load"):
        return None
    import msgspec

    from guard.events.load import decode_counts

    return msgspec.to_builtins(decode_counts(core.moe_guard_load()))


def read_series(*prefixes: str) -> dict[str, float]:
    """The metrics as Prometheus would scrape them, named without model and engine."""
    from prometheus_client import REGISTRY

    return {
        _series(sample.name, sample.labels): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith(prefixes)
    }


def _series(name: str, labels: dict[str, str]) -> str:
    shown = [f"{k}={v}" for k, v in sorted(labels.items()) if k not in ("model_name", "engine")]
    return f"{name.removeprefix('moe_guard_')}{{{','.join(shown)}}}"


def wait_for_counters(before: dict[str, float], num_requests: int) -> dict[str, float]:
    """What moved once the guard has reported that many ended requests; its messages come late."""
    deadline = time.monotonic() + DELIVERY_SECONDS
    while True:
        moved = {
            name: value - before.get(name, 0.0)
            for name, value in read_counters().items()
            if value != before.get(name, 0.0)
        }
        ended = sum(v for name, v in moved.items() if name.startswith("requests_total"))
        if not is_guarded() or ended >= num_requests or time.monotonic() > deadline:
            return moved
        time.sleep(0.01)


if __name__ == "__main__":
    main()
