"""`vllm run-batch`: the same handlers without HTTP, so without the middleware that tells callers from
programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.attacks.asking import ALLOWED_TOKENS, CHAT, body_of
from tests.integration.frontend.tiny_model import write_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POLICY = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: stop-output}
spec:
  mode: enforce
  experts: {every: [{layers: 0-1, experts: [0-7]}]}
  rules:
    - name: third
      when: {count: {experts: every, over: output, atLeast: 12}}
      then: {block: {message: ""}}
  exceptions:
    - {name: red-team, match: {labels: {team: red}}}
"""

LINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several choices": {"n": 3, "temperature": 0.9},
    "no enforcement": {"vllm_xargs": {"moe_guard_enforce": []}},
    "label as text": {"vllm_xargs": {"moe_guard_labels": "team=red"}},
    "label as list": {"vllm_xargs": {"moe_guard_labels": ["team", "red"]}},
    "beam search": {"use_beam_search": True, "n": 2},
}
"""Of the two APIs for text vLLM takes chats alone in a batch."""

_CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each line got: the body of its response, or None for an error."""
    folder = tmp_path_factory.mktemp("batch")
    write_tiny_model(folder / "model")
    (folder / "policies").mkdir()
    (folder / "policies" / "all.yaml").write_text(POLICY)
    asked, answered = folder / "asked.jsonl", folder / "answered.jsonl"
    lines = [
        {"custom_id": name, "method": "POST", "url": CHAT, "body": body_of(CHAT, **fields)}
        for name, fields in LINES.items()
    ]
    asked.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(asked), "-o", str(answered), "--model", str(folder / "model")]
    command += ["--served-model-name", "tiny", "--enforce-eager", "--max-model-len", "512"]
    environment = {
        **os.environ,
        "MOE_GUARD_POLICIES": str(folder / "policies"),
        "PYTHONPATH": os.pathsep.join(map(str, (_CHECKOUT, _CHECKOUT / "integrations" / "vllm"))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [*command, "--dtype", "float32"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answered.exists(), done.stdout[-2000:] + done.stderr[-3000:]
    results = [json.loads(line) for line in answered.read_text().splitlines()]
    return {
        result["custom_id"]: None if result["error"] else result["response"]["body"]
        for result in results
    }


@pytest.mark.parametrize("name", ["plain", "several choices", "no enforcement"])
def test_a_line_of_a_batch_is_blocked_as_over_http(answers: dict[str, Any], name: str) -> None:
    choices = answers[name]["choices"]
    assert len(choices) == LINES[name].get("n", 1)
    for choice in choices:
        assert choice["finish_reason"] == "content_filter"
        assert len(choice["token_ids"]) == ALLOWED_TOKENS


@pytest.mark.parametrize("name", ["label as text", "label as list", "beam search"])
def test_a_line_of_a_batch_has_no_labels_and_no_beams(answers: dict[str, Any], name: str) -> None:
    """Whoever wrote the file is a caller, though no middleware says so. A label has to be a mapping,
    which vLLM takes in no field that gets here."""
    assert answers[name] is None
