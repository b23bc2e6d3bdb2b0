"""What cannot be guarded does not start, and the message says why and what to do."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import Engines
from tests.support.support_recorder import SupportRecord

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ("dense", "TopologyError", "it is not a Mixture-of-Experts model"),
        (
            "out-of-range",
            "PolicyError",
            "names expert 16 of layer 0, but that layer has experts 0-15",
        ),
        ("missing", "PolicyError", "there is no such file or folder"),
        ("unknown-key", "SettingsError", "did you mean 'observe_only'?"),
        ("drill", "SettingsError", "a strict server does not fail on purpose"),
        ("prompt-embeds", "UnsupportedHostError", "prompt embeddings"),
        ("pipeline", "UnsupportedHostError", "pipeline parallelism needs Model Runner V2"),
    ],
)
def test_the_engine_does_not_start(
    engines: Engines, engine: str, error: str, message: str, support_record: SupportRecord
) -> None:
    if engine == "dense":
        support_record.feature("dense models", refused=message)
    result = engines.result("starts", engine)
    assert "error" in result, f"{engine} started"
    last_line = result["error"].strip().splitlines()[-1]
    assert last_line.partition(":")[0].endswith(f".{error}")
    assert message in last_line


def test_a_fault_in_a_policy_is_on_its_line(engines: Engines) -> None:
    assert "range.yaml:11:5: " in engines.result("starts", "out-of-range")["error"]


def test_the_compile_key_tells_engines_with_and_without_the_guard_apart(engines: Engines) -> None:
    keys = {
        name: engines.result("starts", f"key-{name}")["compile_key"]
        for name in ("off", "off-again", "empty", "main")
    }
    assert keys["off"] == keys["off-again"], "the same configuration has the same key"
    assert len({keys["off"], keys["empty"], keys["main"]}) == 3
