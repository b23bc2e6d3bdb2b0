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

SKIPPED_STEPS = 3
"""At the beginning of a slice of decoding: caches are another engine's."""


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
        self._decoding: dict[str, int] = {}  # tokens that each request still has to give
        self._kind: Any = None

    def decode(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each step of a steady batch."""
        kind, steps = (order["concurrency"], order["masks"]), order["steps"] + SKIPPED_STEPS
        if kind != self._kind or not self._decoding or min(self._decoding.values()) <= steps + 1:
            self._refill(order)
            self._kind = kind
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - began)
        for req_id in self._decoding:
            self._decoding[req_id] -= steps
        return {"seconds": seconds[SKIPPED_STEPS:]}

    def _refill(self, order: dict[str, Any]) -> None:
        self._abort()
        tokens = self._job["max_model_len"] - order["prompt_tokens"] - 1
        req_ids = self._add(order, tokens)
        waiting = set(req_ids)
        while waiting:  # until all are decoding
            waiting -= {output.request_id for output in self._engine.step() if output.outputs}
        self._decoding = dict.fromkeys(req_ids, tokens - 2 * len(req_ids))
        if self._decoding and min(self._decoding.values()) <= order["steps"] + SKIPPED_STEPS + 1:
            self._decoding = dict.fromkeys(req_ids, order["steps"] + SKIPPED_STEPS + 2)

    def prefill(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds from when all requests came to each one's first token."""
        self._abort()
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

    def _abort(self) -> None:
        if self._decoding:
            self._engine.abort_request(list(self._decoding))
            self._decoding = {}
        while self._engine.has_unfinished_requests():
            self._engine.step()


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(job["answers_fd"], "w", buffering=1)
    engines = {}
    for engine in job["engines"]:
        engines[engine["name"]] = Slices(engine)
        answers.write(json.dumps({"ready": engine["name"]}) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        slices = engines[order["engine"]]
        run = slices.decode if order["workload"] == "decode" else slices.prefill
        answers.write(json.dumps(run(order)) + "\n")


if __name__ == "__main__":
    main()
