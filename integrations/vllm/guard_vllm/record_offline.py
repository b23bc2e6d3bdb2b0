"""`moe-guard record`'s own process: runs prompts through vLLM, and keeps the trace of their routing.

python -m guard_vllm.record_offline JOB.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files
from guard.trace.writer import TraceWriter
from guard_vllm.compat import seam
from guard_vllm.recording import FLUSH_METHOD
from guard_vllm.settings import CONFIG_KEY


@dataclass(frozen=True)
class Job:
    """What the command hands over.

    prompts: each with `prompt` or `messages`, and `labels`
    vllm: arguments of `vllm.LLM`, besides those that recording needs
    """

    model: str
    prompts: Sequence[Mapping[str, Any]]
    out: str
    max_tokens: int
    weights: str
    vllm: Mapping[str, Any]


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="moe-guard-record-") as scratch:
        policies, traces = Path(scratch, "policies"), Path(scratch, "traces")
        policies.mkdir()
        section = {
            "policies": str(policies),
            "record": str(traces),
            "record_weights": job.weights,
            "reload": False,
        }
        llm = seam("vllm.entrypoints.llm", "LLM")(
            **{
                # A prefix from the cache would be unseen.
                "enable_prefix_caching": False,
                "async_scheduling": False,
                **job.vllm,
                "model": job.model,
                "additional_config": {CONFIG_KEY: section},
            }
        )
        labels = _run(llm, job)
        llm.collective_rpc(FLUSH_METHOD)
        _keep(trace_files(traces), Path(job.out), labels)


def _run(llm: Any, job: Job) -> dict[str, tuple[int, Mapping[str, str]]]:
    """By vLLM's number of a request, its place among the prompts and its labels."""
    sampling = seam("vllm.sampling_params", "SamplingParams")(
        temperature=0.0, max_tokens=job.max_tokens
    )
    numbers: dict[str, tuple[int, Mapping[str, str]]] = {}
    for is_chat in (False, True):
        places = [n for n, one in enumerate(job.prompts) if ("messages" in one) is is_chat]
        if not places:
            continue
        asked = [job.prompts[n]["messages" if is_chat else "prompt"] for n in places]
        outputs = llm.chat(asked, sampling) if is_chat else llm.generate(asked, sampling)
        for place, output in zip(places, outputs, strict=True):
            numbers[output.request_id] = place, job.prompts[place]["labels"]
    return numbers


def _keep(
    traces: Sequence[Path], out: Path, numbers: Mapping[str, tuple[int, Mapping[str, str]]]
) -> None:
    """The trace with the labels of the prompts, and their line numbers as ids."""
    first = TraceReader(traces[0])
    with TraceWriter(out, first.header) as writer:
        for path in traces:
            for request in TraceReader(path):
                place, labels = numbers[request.request_id.rpartition("-")[0]]
                writer.write(TracedRequest(request.routing, str(place + 1), request.time, dict(labels)))


if __name__ == "__main__":
    main()
