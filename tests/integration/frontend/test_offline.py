"""The offline LLM: the same finish, the same checks, no beam search under policies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

def attempt(function, *arguments):
    try:
        return [(o.finish_reason, o.stop_reason, len(o.token_ids)) for r in
                function(*arguments, use_tqdm=False) for o in r.outputs]
    except ValueError as error:
        return [type(error).__name__, str(error)]

def params(extra_args, **more):
    return SamplingParams(max_tokens=9, ignore_eos=True, extra_args=extra_args, **more)

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=512, dtype="float32")
    report = {
        "blocked": attempt(llm.generate, ["hi"], params({"test_block_after": 3})),
        "unknown policy": attempt(llm.generate, ["hi"], params({"moe_guard_enforce": ["tinny"]})),
        "stop string": attempt(llm.generate, ["hi"], params(None, stop=["moe_guard"])),
        "beam search": attempt(llm.beam_search, [{"prompt": "hi"}], BeamSearchParams(2, 4)),
        "after all that": attempt(llm.generate, ["hi"], params(None)),
    }
    print("REPORT " + json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(
    model_path: Path, vllm_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("offline") / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(model_path)],
        env=vllm_env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stderr[-3000:]
    made: dict[str, Any] = json.loads(lines[0].removeprefix("REPORT "))
    return made


def test_blocked_output_is_content_filtered(report: dict[str, Any]) -> None:
    assert report["blocked"] == [["content_filter", "moe_guard:tiny/stop", 3]]


def test_requests_are_checked_as_over_http(report: dict[str, Any]) -> None:
    assert report["unknown policy"][0] == "RequestArgumentError"
    assert "did you mean 'tiny'?" in report["unknown policy"][1]
    assert report["stop string"][0] == "RequestArgumentError"


def test_beam_search_is_refused(report: dict[str, Any]) -> None:
    assert report["beam search"][0] == "BeamSearchError"


def test_refusals_leave_the_engine_usable(report: dict[str, Any]) -> None:
    assert report["after all that"] == [["length", None, 9]]
