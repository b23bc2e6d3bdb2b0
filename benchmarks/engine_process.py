"""One vLLM engine in a process of its own, which runs the same workload each time it is told to.

Started by `overhead.py`. Reads a JSON job from its first argument, then a line per round from
standard input; answers each with a JSON line on the descriptor that the job names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(job["answers_fd"], "w", buffering=1)
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["model"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=512,
        max_num_seqs=job["requests"],
        enable_prefix_caching=False,
        enforce_eager=job["eager"],
        additional_config=job["additional_config"],
    )
    prompts = [
        {"prompt_token_ids": [(17 * i + 5 * j) % 1000 for j in range(job["prompt_tokens"])]}
        for i in range(job["requests"])
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=job["output_tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args=job["extra_args"] if i % 2 else None,
        )
        for i in range(job["requests"])
    ]
    answers.write(json.dumps({"ready": True}) + "\n")
    for _ in sys.stdin:
        began = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        answers.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")


if __name__ == "__main__":
    main()
