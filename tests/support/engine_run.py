"""Runs engines and requests of a JSON job on vLLM's offline `LLM`, and writes what came of them.

    python engine_run.py JOB.json RESULT.json

Job: {"engines": [{"name", "engine": arguments of LLM, "config_only": false, "record": false,
"async": false, "correction_bias": fills the model by `random_weights`, optional,
"cases": [{"name", "batches": [[{"prompt": token ids, "sampling": of SamplingParams,
"continues": [batch, request] whose whole text goes before the prompt, "salt": keeps its KV apart;
optional}]], "before_batch": of each batch a worker method with its arguments, or null; optional}]}]}.
The batches of a case run one after another; the prefix cache is emptied before each case.

Result: by engine name, "error" or "compile_key" and, by case name, what `run_case` returns. All
floats are in `float.hex`, so that equal means equal to the last bit.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

DELIVERY_SECONDS = 10.0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {}
    for engine in job["engines"]:
        result[engine["name"]] = run_engine(engine)
        gc.collect()  # an engine that goes while another starts would take that one's process groups
    Path(sys.argv[2]).write_text(json.dumps(result))


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
        with async_scheduling() if job.get("async") else nullcontext():
            llm = LLM(**recorder | job["engine"])
        start_seconds = round(time.monotonic() - started, 1)
        return {
            "guarded": "guard_vllm.client" in sys.modules,
            "plugged": "guard_vllm" in sys.modules,
            "start_seconds": start_seconds,
            "cases": {case["name"]: run_case(llm, case, job.get("record")) for case in job["cases"]},
            "seconds": round(time.monotonic() - started, 1),
        }
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test looks at
        # The error of a start that failed in another process is in that process's log only.
        return {"error": "".join(traceback.format_exception(error))}


_RECORDER = "tests.support.routing_recorder.RoutingRecorder"


def run_case(llm: Any, case: dict[str, Any], record: bool | None) -> dict[str, Any]:
    """batches: outputs of each; decisions, counters: what moved; gauges: the guard's state behind each
    batch; rows: see `RoutingRecorder`."""
    llm.reset_prefix_cache()
    counters, seen = read_counters(), {decision.decision_id for decision in read_decisions()}
    if record:
        llm.collective_rpc("start_recording")
    batches: list[list[dict[str, Any]]] = []
    gauges: list[dict[str, float]] = []
    calls = case.get("before_batch", [None] * len(case["batches"]))
    for requests, call in zip(case["batches"], calls, strict=True):
        if call is not None:
            llm.collective_rpc(call[0], args=tuple(call[1:]))
        batches.append(run_batch(llm, [prompt_of(request, batches) for request in requests]))
        gauges.append(read_series("moe_guard_up", "moe_guard_blind_layers"))
    num_requests = sum(
        request["sampling"].get("n", 1) for requests in case["batches"] for request in requests
    )
    moved = wait_for_counters(counters, num_requests)
    return {
        "batches": batches,
        "decisions": [
            as_json(decision) for decision in read_decisions() if decision.decision_id not in seen
        ],
        "counters": moved,
        "gauges": gauges,
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
    from vllm import SamplingParams

    outputs = llm.generate(
        [
            {"prompt_token_ids": request["prompt"]}
            | ({"cache_salt": request["salt"]} if "salt" in request else {})
            for request in requests
        ],
        [SamplingParams(detokenize=False, **request["sampling"]) for request in requests],
        use_tqdm=False,
    )
    return [
        {
            "request_id": output.request_id,
            "prompt": list(output.prompt_token_ids),
            "cached": output.num_cached_tokens,
            "samples": [sample_json(sample) for sample in output.outputs],
        }
        for output in outputs
    ]


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


def as_json(decision: Any) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(decision)
    return fields


def read_counters() -> dict[str, float]:
    series = read_series("moe_guard_", "vllm:spec_decode_")
    return {name: value for name, value in series.items() if "_total{" in name}


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
