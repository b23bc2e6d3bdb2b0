"""`moe-guard causal`'s own process: losses and answers of texts under several masks, in one engine.

python -m guard_vllm.causal_offline JOB.json

Each mask is a policy of its own, and a label says which one a request is under: so all run in one
batch, as they would in a server.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from guard_vllm.compat import seam
from guard_vllm.request_facts import LABELS
from guard_vllm.settings import CONFIG_KEY

LABEL = "causal"


@dataclass(frozen=True)
class Job:
    """What the command hands over.

    texts: each with `prompt` or `messages`; of a chat that ends with an answer the answer counts
    tasks: the same, each with an `answer`
    sets: of (layer, expert), a mask each
    vllm: arguments of `vllm.LLM`, besides those that masking needs
    """

    model: str
    texts: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]
    sets: Sequence[Sequence[tuple[int, int]]]
    method: str
    max_tokens: int
    out: str
    vllm: Mapping[str, Any]


class Tokenized(NamedTuple):
    """first: the first token whose loss counts"""

    ids: list[int]
    first: int


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="moe-guard-causal-") as policies:
        for number, experts in enumerate(job.sets):
            policy = Path(policies, f"mask-{number}.yaml")
            policy.write_text(json.dumps(_policy(number, experts, job.method)), encoding="utf-8")
        llm = seam("vllm.entrypoints.llm", "LLM")(
            **{
                **job.vllm,
                "model": job.model,
                "additional_config": {
                    CONFIG_KEY: {
                        "policies": policies,
                        "reload": False,
                        "mask_actions": max(64, len(job.sets)),
                    }
                },
            }
        )
        texts = _losses(llm, job)
        found = {"texts": texts, "tasks": _answers(llm, job) if job.tasks else []}
        Path(job.out).write_text(json.dumps(found), encoding="utf-8")
        # Else its processes are waited for when this one ends, and wait for it.
        seam(seam(llm, "llm_engine"), "engine_core").shutdown()


def _policy(number: int, experts: Sequence[tuple[int, int]], method: str) -> dict[str, Any]:
    """JSON is YAML."""
    layers = sorted({layer for layer, _ in experts})
    entries = [
        {"layer": layer, "experts": sorted(expert for own, expert in experts if own == layer)}
        for layer in layers
    ]
    rule = {
        "name": "mask",
        "match": {"labels": {LABEL: str(number)}},
        "when": {"always": {}},
        "then": {"mask": {"experts": "masked", "method": method, "until": "request-end"}},
    }
    return {
        "apiVersion": "moe-guard/v1",
        "kind": "Policy",
        "metadata": {"name": f"causal-{number}"},
        "spec": {"mode": "enforce", "experts": {"masked": entries}, "rules": [rule]},
    }


def _variants(job: Job) -> list[dict[str, Any]]:
    """Arguments of the sampling parameters: without a mask, and under each."""
    return [
        {},
        *({"extra_args": {LABELS: {LABEL: str(number)}}} for number in range(len(job.sets))),
    ]


def _losses(llm: Any, job: Job) -> list[dict[str, Any]]:
    """Of each text how many tokens count, and the sum of their losses under each variant."""
    sampling = seam("vllm.sampling_params", "SamplingParams")
    tokenizer = llm.get_tokenizer()
    tokenized = [_tokenized(tokenizer, text) for text in job.texts]
    asked, parameters = [], []
    for variant in _variants(job):
        for text in tokenized:
            asked.append({"prompt_token_ids": text.ids})
            parameters.append(sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0, **variant))
    outputs = llm.generate(asked, parameters)
    found: list[dict[str, Any]] = [
        {"tokens": len(text.ids) - text.first, "losses": []} for text in tokenized
    ]
    for place, output in enumerate(outputs):
        text = tokenized[place % len(tokenized)]
        losses = [
            -output.prompt_logprobs[position][text.ids[position]].logprob
            for position in range(text.first, len(text.ids))
        ]
        found[place % len(tokenized)]["losses"].append(float(sum(losses)))
    return found


def _tokenized(tokenizer: Any, text: Mapping[str, Any]) -> Tokenized:
    if "prompt" in text:
        return Tokenized(list(tokenizer.encode(text["prompt"])), 1)
    messages = text["messages"]
    whole = _chat(tokenizer, messages, with_turn=False)
    if messages[-1].get("role") != "assistant" or len(messages) < 2:
        return Tokenized(whole, 1)
    before = _chat(tokenizer, messages[:-1], with_turn=True)
    shared = next(
        (n for n, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other),
        min(len(before), len(whole)),
    )
    return Tokenized(whole, max(1, shared))


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, with_turn: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=with_turn, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _answers(llm: Any, job: Job) -> list[list[bool]]:
    """Of each task, whether its answer was given under each variant."""
    sampling = seam("vllm.sampling_params", "SamplingParams")
    tokenizer = llm.get_tokenizer()
    found: list[list[bool]] = [[] for _ in job.tasks]
    asked, parameters = [], []
    for variant in _variants(job):
        for task in job.tasks:
            if "prompt" in task:
                asked.append({"prompt": task["prompt"]})
            else:
                asked.append({"prompt_token_ids": _chat(tokenizer, task["messages"], with_turn=True)})
            parameters.append(sampling(temperature=0.0, max_tokens=job.max_tokens, **variant))
    for place, output in enumerate(llm.generate(asked, parameters)):
        task = job.tasks[place % len(job.tasks)]
        said = output.outputs[0].text.strip()
        found[place % len(job.tasks)].append(said.startswith(str(task["answer"]).strip()))
    return found


if __name__ == "__main__":
    main()
