"""A process with one or several vLLM engines, of which one at a time runs a slice of work.

Started by `runs.py`. Reads a JSON job from its first argument, then a JSON line for each slice from
standard input; answers each with a JSON line on the descriptor that the job names.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

import torch

SKIPPED_STEPS = 3
"""At the beginning of a slice of decoding: caches hold what another engine needs."""


class Slices:
    """An engine, and the requests that it is decoding."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        os.chdir(job["folder"])  # all paths are the same in it, so that compiled graphs are used again
        self._job = job
        self._engine = LLM(
            model=job["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            seed=0,
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            disable_log_stats=True,
            additional_config=job["additional_config"],
            **job["arguments"],
        ).llm_engine
        self._numbers = itertools.count()

    @property
    def model(self) -> torch.nn.Module:
        core = self._engine.engine_core.engine_core
        model: torch.nn.Module = core.model_executor.driver_worker.worker.model_runner.get_model()
        return model

    def decode(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each step of a steady batch. It is a new one in each slice, so that all those
        compared have read the same number of tokens before."""
        req_ids = self._add(order, self._job["max_model_len"] - order["prompt_tokens"] - 1)
        waiting = set(req_ids)
        while waiting:  # until all are decoding
            waiting -= {output.request_id for output in self._engine.step() if output.outputs}
        seconds = []
        for _ in range(SKIPPED_STEPS + order["steps"]):
            began = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - began)
        self._engine.abort_request(req_ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {"seconds": seconds[SKIPPED_STEPS:]}

    def prefill(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds from when all requests came to each one's first token."""
        began = time.perf_counter()
        waiting = set(self._add(order, 1))
        seconds = []
        while waiting:
            done = {output.request_id for output in self._engine.step() if output.outputs}
            seconds += [time.perf_counter() - began] * len(done & waiting)
            waiting -= done
        return {"seconds": seconds}

    def _add(self, order: dict[str, Any], tokens: int) -> list[str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        masks, length = order["masks"], order["prompt_tokens"]
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
            prompt = {"prompt_token_ids": [3 + (17 * nth + 5 * j) % 1000 for j in range(length)]}
            self._engine.add_request(str(number), prompt, params)
            req_ids.append(str(number))
        return req_ids


def share_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let `model` read the weights of `other`, which are the same numbers. Where weights lie in memory
    decides how fast they are read, by more than what is measured here."""
    weights = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        parameter.data = weights[name].data


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(job["answers_fd"], "w", buffering=1)
    engines = {}
    for engine in job["engines"]:
        slices = Slices(engine)
        if engines and job["share_weights"]:
            share_weights(slices.model, next(iter(engines.values())).model)
        engines[engine["name"]] = slices
        answers.write(json.dumps({"ready": engine["name"]}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        slices = engines[order["engine"]]
        run = slices.decode if order["workload"] == "decode" else slices.prefill
        answers.write(json.dumps(run(order)) + "\n")


if __name__ == "__main__":
    main()
