"""Off, or armed with nothing that applies: bit for bit the output of vLLM without the plugin."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import MODES, Engines
from tests.integration.offline.reading import counter, texts

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("mode", MODES)
def test_the_run_to_compare_with_has_no_plugin(engines: Engines, mode: str) -> None:
    assert not engines.result(f"{mode}-plain", "plain")["plugged"]
    assert engines.result(f"{mode}-guarded", "off")["plugged"]


@pytest.mark.parametrize(
    ("mode", "engine"),
    [(mode, engine) for mode in MODES for engine in ("off", "empty", "main")]
    + [("eager", "never"), ("v2", "never")],
)
def test_tokens_and_logprobs_are_those_of_vllm_without_the_plugin(
    engines: Engines, mode: str, engine: str
) -> None:
    plain = engines.case(f"{mode}-plain", "plain", "unmasked")
    assert texts(engines.case(f"{mode}-guarded", engine, "unmasked")) == texts(plain)


@pytest.mark.parametrize("mode", MODES)
def test_off_counts_nothing_and_an_empty_folder_counts_requests(engines: Engines, mode: str) -> None:
    assert engines.case(f"{mode}-guarded", "off", "unmasked")["counters"] == {}
    armed = engines.case(f"{mode}-guarded", "empty", "unmasked")
    assert counter(armed, "requests_total", outcome="passed") == len(armed["batches"][0])
