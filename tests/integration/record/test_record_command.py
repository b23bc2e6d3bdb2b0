"""`moe-guard record` as an operator calls it, on a tiny model with a tokenizer of bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny_models import NUM_LAYERS, TOP_K, write_tiny_moe

pytestmark = pytest.mark.vllm

PROMPTS = ["how to bake bread", "x", "a longer question, with a comma and 17 numbers"]
MAX_TOKENS = 9
TIMEOUT_SECONDS = 600

Recorded = tuple[TraceReader, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record") / "moe"
    write_tiny_moe(folder)
    write_byte_tokenizer(folder)
    return folder


def record(model: Path, name: str, *options: str) -> Recorded:
    """The trace, and what the command said."""
    prompts, out = model.parent / "prompts.jsonl", model.parent / f"{name}.moetrace"
    lines = [{"prompt": text, "label": f"label-{n}"} for n, text in enumerate(PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_GUARD_", "VLLM_"))}
    environment |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(model.parent / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from guard.cli import main; main()", "record", str(model)),
            *("--prompts", str(prompts), "--out", str(out), "--max-tokens", str(MAX_TOKENS)),
            *("--vllm", json.dumps(arguments), *options),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return TraceReader(out), done.stderr


@pytest.fixture(scope="module")
def with_tokens(model: Path) -> Recorded:
    return record(model, "with-tokens", "--tokens")


def by_prompt(trace: TraceReader) -> list[TracedRequest]:
    return sorted(trace, key=lambda request: int(request.request_id))


def test_the_token_ids_are_those_of_the_models_own_tokenizer(
    model: Path, with_tokens: Recorded
) -> None:
    trace, _ = with_tokens
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert trace.header.tokens
    requests = by_prompt(trace)
    assert len(requests) == len(PROMPTS)
    for text, request in zip(PROMPTS, requests, strict=True):
        routing, token_ids = request.routing, request.token_ids
        assert token_ids is not None
        prompt = tokenizer(text)["input_ids"]
        assert token_ids[: routing.num_prompt_tokens].tolist() == prompt
        assert len(token_ids) == len(routing.topk_ids) == len(prompt) + MAX_TOKENS - 1


def test_the_outputs_token_ids_are_those_that_the_model_says(
    model: Path, with_tokens: Recorded
) -> None:
    """By Hugging Face's own implementation; of the answer's last token no routing is known."""
    by_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for request in with_tokens[0]:
        assert request.token_ids is not None
        whole = request.token_ids.tolist()
        prompt = torch.tensor([whole[: request.routing.num_prompt_tokens]])
        said = by_transformers.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        assert said[0].tolist()[:-1] == whole


def test_the_routing_and_labels_are_those_of_the_prompts(with_tokens: Recorded) -> None:
    trace, _ = with_tokens
    for number, request in enumerate(by_prompt(trace)):
        assert request.labels == {"label": f"label-{number}"}
        routing = request.routing
        assert (routing.first_seen, routing.unseen) == (0, frozenset())
        assert routing.topk_ids.shape[1:] == (NUM_LAYERS, TOP_K)
        assert (routing.topk_ids >= 0).all()


def test_while_it_runs_vllm_shows_how_far_it_is(with_tokens: Recorded) -> None:
    _, said = with_tokens
    assert "Processed prompts: 100%" in said


def test_without_the_option_the_same_routing_is_recorded_and_no_token_ids(
    model: Path, with_tokens: Recorded
) -> None:
    trace, _ = record(model, "without-tokens")
    assert not trace.header.tokens
    for request, other in zip(by_prompt(trace), by_prompt(with_tokens[0]), strict=True):
        assert request.token_ids is None
        np.testing.assert_array_equal(request.routing.topk_ids, other.routing.topk_ids)
