"""Every route that vLLM's server mounts is known: guarded, refused, or one that generates nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.admin.endpoint import AdminEndpoint

from tests.integration.attacks.routes import ROUTES, Kind

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent

WHAT_TO_DO = (
    "vLLM has routes that MoE Guard has not looked at: {}. Read what each does with the engine. If it "
    "generates, attack it in tests/integration/attacks and mend what it tells of a block in "
    "guard_vllm/frontend; if it cannot be guarded, refuse it in guard_vllm/host.py. Then say so in "
    "tests/integration/attacks/routes.py and, if it is an attack, in docs/SECURITY.md"
)

EVERYTHING = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_COHERE_API": "1",
}


def routes_of(tasks: tuple[str, ...], *arguments: str, pooling: str = "embed") -> set[str]:
    """The paths of vLLM's application with the guard's, as a server builds it, without an engine.

    pooling: which of the tasks a model that pools is served for
    """
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    model: Any = SimpleNamespace(
        hf_config=SimpleNamespace(num_labels=1), get_pooling_task=lambda _: pooling
    )
    app = build_app(args, tasks, model)
    AdminEndpoint().attach_router(app)
    return {route.path for route in app.routes}


def generating(*suffixes: str) -> set[str]:
    return {path for path, (kind, _) in ROUTES.items() if kind is Kind.GUARDED} - set(suffixes)


def test_every_route_of_a_server_as_it_is_started_is_known() -> None:
    found = routes_of(("generate",))
    assert not found - ROUTES.keys(), WHAT_TO_DO.format(sorted(found - ROUTES.keys()))
    assert generating("/cohere/v2/chat") <= found, "a route is gone: take it out of routes.py"
    only_on_request = {path for path, (kind, _) in ROUTES.items() if kind is Kind.CHANGES}
    assert found & only_on_request == {"/inference/v1/abort_requests"}, "403 without --enable-scale-out"


@pytest.mark.parametrize(
    "arguments",
    [("--enable-scale-out", "--enable-tokenizer-info-endpoint"), ("--tokens-only",)],
    ids=["scale out", "tokens only"],
)
def test_every_route_of_a_server_that_opens_all_it_has_is_known(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every task, every endpoint for developers; some of it no guarded server can be started with."""
    from vllm.tasks import POOLING_TASKS

    for name, value in EVERYTHING.items():
        monkeypatch.setenv(name, value)
    tasks = ("generate", "transcription", "realtime", "render", *POOLING_TASKS)
    options = ("--enable-offline-docs", "--enable-fault-tolerance", *arguments)
    found = {path for task in POOLING_TASKS for path in routes_of(tasks, *options, pooling=task)}
    assert not found - ROUTES.keys(), WHAT_TO_DO.format(sorted(found - ROUTES.keys()))
    assert {"/collective_rpc", "/pooling", "/v1/realtime", "/abort_requests"} <= found


def test_each_guarded_route_names_the_test_that_attacks_it() -> None:
    for path, (kind, shown) in ROUTES.items():
        if kind is Kind.GUARDED and shown.startswith("test_"):
            assert path.rpartition("/v1/")[2] in (HERE / shown).read_text(), (path, shown)
