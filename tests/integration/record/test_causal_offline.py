"""What `moe-guard causal` runs in vLLM: losses as transformers has them, and masks that are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.names import Split
from demo.profile_prompts import text_lines

pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parents[3] / "demo" / "model"
RESTRICTED = [(0, 14), (0, 15), (1, 7), (1, 10), (1, 13), (1, 14), (2, 1), (2, 6), (2, 7), (3, 1)]
UNUSED_SET = [(3, 3)]
TIMEOUT_SECONDS = 600


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    lines = text_lines(Split.HELD_OUT, seed=5)
    chosen = [
        [line for line in lines if line["label"] == label][:6] for label in ("restricted", "benign")
    ]
    return [*chosen[0], *chosen[1], {"prompt": "How do I make a beeswax candle?"}]


@pytest.fixture(scope="module")
def found(texts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("causal")
    out = folder / "found.json"
    job = {
        "model": str(MODEL),
        "texts": texts,
        "tasks": [{"messages": texts[0]["messages"][:1], "answer": "no such answer"}],
        "sets": [RESTRICTED, UNUSED_SET],
        "method": "reroute",
        "max_tokens": 4,
        "out": str(out),
        "vllm": {"dtype": "float32", "enforce_eager": True, "max_model_len": 512},
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_GUARD_", "VLLM_"))}
    environment |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "guard_vllm.causal_offline", str(folder / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def loss_by_transformers(text: dict[str, Any]) -> tuple[int, float]:
    """Tokens of the answer (of a bare prompt: all but the first), and the sum of their losses."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if "prompt" in text:
        ids, first = tokenizer(text["prompt"])["input_ids"], 1
    else:
        parts = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=turn, tokenize=False)
            for messages, turn in ((text["messages"], False), (text["messages"][:-1], True))
        ]
        ids, before = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        assert ids[: len(before)] == before
        first = len(before)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return len(ids) - first, float(losses[first - 1 :].sum())


def test_losses_without_a_mask_are_those_of_transformers(
    texts: list[dict[str, Any]], found: dict[str, Any]
) -> None:
    for number in (0, 6, len(texts) - 1):
        tokens, loss = loss_by_transformers(texts[number])
        assert found["texts"][number]["tokens"] == tokens
        assert found["texts"][number]["losses"][0] == pytest.approx(loss, rel=1e-3)


def test_the_set_is_masked_and_its_target_suffers(found: dict[str, Any]) -> None:
    increases = [[after - text["losses"][0] for after in text["losses"][1:]] for text in found["texts"]]
    of_target, of_benign = increases[:6], increases[6:12]
    assert min(by_set for by_set, _ in of_target) > 1.0
    assert sum(by_set for by_set, _ in of_target) > 5 * sum(abs(by_set) for by_set, _ in of_benign)
    assert all(by_other != by_set for by_set, by_other in of_target)


def test_tasks_are_answered_under_each_mask(found: dict[str, Any]) -> None:
    assert found["tasks"] == [[False, False, False]]
