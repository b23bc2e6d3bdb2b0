"""A session whose input is streamed turns output into prompt, so it is refused where rules judge."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from guard_vllm.frontend.blocked import Sources
from guard_vllm.frontend.request_args import RequestArgumentError, install_request_args
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.support_recorder import SupportRecord


async def _chunks() -> AsyncGenerator[list[int], None]:
    yield [1]


def _install(monkeypatch: pytest.MonkeyPatch, *policies: str) -> None:
    """On vLLM's own functions, whatever another test of this process has put around them."""
    for owner, name in ((AsyncLLM, "generate"), (InputProcessor, "process_inputs")):
        monkeypatch.setattr(owner, name, inspect.unwrap(owner.__dict__[name]))
    install_request_args(Sources({}, policies, has_rules=lambda: True, redact=False))


def test_streamed_input_is_refused_under_policies(
    monkeypatch: pytest.MonkeyPatch, support_record: SupportRecord
) -> None:
    _install(monkeypatch, "p")

    with pytest.raises(RequestArgumentError, match="give the whole prompt in one request") as refused:
        AsyncLLM.generate(object(), _chunks(), None, "id")
    support_record.feature("streamed input", refused=str(refused.value))


@pytest.mark.parametrize(("policies", "prompt"), [(("p",), {"prompt_token_ids": [1]}), ((), _chunks())])
def test_a_whole_prompt_passes_and_so_does_a_stream_where_nothing_judges(
    monkeypatch: pytest.MonkeyPatch, policies: tuple[str, ...], prompt: Any
) -> None:
    _install(monkeypatch, *policies)
    AsyncLLM.generate(object(), prompt, None, "id")
