"""Beam search is a 400 under policies; gRPC, the Rust front end and shared ids do not start."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from guard_vllm.frontend.refusals import refuse_unguarded_frontends, warn_of_open_endpoints

from guard.errors import UnsupportedHostError
from tests.support.support_recorder import SupportRecord

SERVE = ["vllm", "serve", "MODEL"]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_http_server_starts(value: str | None) -> None:
    env = {} if value is None else {"VLLM_USE_RUST_FRONTEND": value}
    refuse_unguarded_frontends(SERVE, env, modules=("vllm", "vllm.entrypoints.openai.api_server"))


def test_the_rust_front_end_is_refused(support_record: SupportRecord) -> None:
    with pytest.raises(UnsupportedHostError, match="unset VLLM_USE_RUST_FRONTEND") as refused:
        refuse_unguarded_frontends(SERVE, {"VLLM_USE_RUST_FRONTEND": "1"}, modules=())
    support_record.feature("Rust front end", refused=str(refused.value))


@pytest.mark.parametrize(
    ("argv", "modules"),
    [
        ([*SERVE, "--grpc"], ()),
        (SERVE, ("vllm.entrypoints.launchers.grpc_server",)),
        (["grpc_server.py"], ("vllm.entrypoints.grpc_server",)),
    ],
    ids=["argument", "config file", "run as a module"],
)
def test_grpc_is_refused(
    argv: list[str], modules: tuple[str, ...], support_record: SupportRecord
) -> None:
    with pytest.raises(UnsupportedHostError, match="serve over HTTP") as refused:
        refuse_unguarded_frontends(argv, {}, modules=modules)
    support_record.feature("gRPC server", refused=str(refused.value))


def test_ids_that_two_requests_may_share_are_refused() -> None:
    plain = {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1"}
    with pytest.raises(UnsupportedHostError, match="two requests could have one id"):
        refuse_unguarded_frontends(SERVE, plain, modules=())


@pytest.mark.parametrize(("value", "num_warnings"), [("1", 1), ("0", 0), ("", 0)])
def test_endpoints_for_developers_are_warned_of(
    value: str, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_open_endpoints({"VLLM_SERVER_DEV_MODE": value})
    assert len(caplog.records) == num_warnings


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "stream": True},
        ),
    ],
    ids=["completion", "chat", "streamed chat"],
)
def test_beam_search_is_a_400(
    http: httpx.Client, path: str, body: dict[str, Any], support_record: SupportRecord
) -> None:
    answer = http.post(path, json={"model": "tiny", "use_beam_search": True, "n": 2, **body})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("beam search is not served")
    support_record.feature("beam search", refused=message)
