"""`moe-guard record`'s own process: runs prompts through vLLM, and keeps the trace of their routing.

python -m guard_vllm.record_offline JOB.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.errors import GuardError
from guard.program.verdict import Routing
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
    tokens: keep token ids
    """

    model: str
    prompts: Sequence[Mapping[str, Any]]
    out: str
    max_tokens: int
    weights: str
    vllm: Mapping[str, Any]
    tokens: bool = False


class TokensError(GuardError):
    """What vLLM says of a request's tokens is not what was routed."""


class Answered(NamedTuple):
    """A prompt by its place among them. token_ids: of the prompt and the answer"""

    place: int
    labels: Mapping[str, str]
    token_ids: NDArray[np.int32]


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
        answered = _run(llm, job)
        llm.collective_rpc(FLUSH_METHOD)
        keep(trace_files(traces), Path(job.out), answered, with_tokens=job.tokens)


def _run(llm: Any, job: Job) -> dict[str, Answered]:
    """By vLLM's number of a request. vLLM shows its own progress."""
    sampling = seam("vllm.sampling_params", "SamplingParams")(
        temperature=0.0, max_tokens=job.max_tokens
    )
    answered: dict[str, Answered] = {}
    for is_chat in (False, True):
        places = [n for n, one in enumerate(job.prompts) if ("messages" in one) is is_chat]
        if not places:
            continue
        asked = [job.prompts[n]["messages" if is_chat else "prompt"] for n in places]
        outputs = llm.chat(asked, sampling) if is_chat else llm.generate(asked, sampling)
        for place, output in zip(places, outputs, strict=True):
            token_ids = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
            answered[output.request_id] = Answered(
                place, job.prompts[place]["labels"], np.array(token_ids, np.int32)
            )
    return answered


def keep(
    traces: Sequence[Path], out: Path, answered: Mapping[str, Answered], *, with_tokens: bool
) -> None:
    """The trace with the labels of the prompts, their line numbers as ids, and token ids if wanted.

    Raises TokensError, TraceError.
    """
    header = replace(TraceReader(traces[0]).header, tokens=with_tokens)
    with TraceWriter(out, header) as writer:
        for path in traces:
            for request in TraceReader(path):
                place, labels, token_ids = answered[request.request_id.rpartition("-")[0]]
                kept = TracedRequest(request.routing, str(place + 1), request.time, dict(labels))
                writer.write(_with_tokens(kept, token_ids) if with_tokens else kept)


def _with_tokens(request: TracedRequest, token_ids: NDArray[np.int32]) -> TracedRequest:
    """As many as there are positions: the last token was not fed back. Positions without a token are
    cut off: an engine that works ahead computes some that no answer holds."""
    routing = request.routing
    if len(token_ids) < routing.num_prompt_tokens:
        raise TokensError(
            f"prompt {request.request_id}: vLLM names {len(token_ids)} tokens where the prompt has "
            f"{routing.num_prompt_tokens}; record without --tokens"
        )
    routing = _cut(routing, len(token_ids))
    return replace(request, routing=routing, token_ids=token_ids[: len(routing.topk_ids)])


def _cut(routing: Routing, stop: int) -> Routing:
    if len(routing.topk_ids) <= stop:
        return routing
    return Routing(
        routing.topk_ids[:stop],
        routing.topk_weights[:stop],
        routing.num_prompt_tokens,
        min(routing.first_seen, stop),
        frozenset(position for position in routing.unseen if position < stop),
    )


if __name__ == "__main__":
    main()
