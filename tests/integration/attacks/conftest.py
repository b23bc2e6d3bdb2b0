"""One guarded server for all attacks, started as an operator would who opens much of vLLM.

`make test-all` attacks the same server compiled, and with two API servers, as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.attacks.policies import POLICIES
from tests.integration.frontend.tiny_model import write_tiny_model
from tests.integration.server.conftest import Server, serving
from tests.support.thorough import IS_THOROUGH

ADMIN_KEY = "operators-key"
RED_KEY = "sk-of-the-red-team"
BLOCK_TOKENS = 32

OPTIONS = (
    *("--label-header", "tenant=X-Tenant", "--label-header", "team=X-Team"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
    *("--block-size", str(BLOCK_TOKENS), "--max-num-batched-tokens", "64"),
    "--enable-prompt-tokens-details",
)
EAGER = "eager"
PLACES: dict[str, list[str]] = {
    EAGER: [],
    "compiled": ["--no-enforce-eager"],
    "two-api-servers": ["--api-server-count", "2"],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if IS_THOROUGH and "server" in metafunc.fixturenames:
        metafunc.parametrize("server", list(PLACES), indirect=True, scope="package")


def _keys(file: Path, key: str, labels: str) -> Path:
    file.write_text(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}: {labels}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="package")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attacked")
    write_tiny_model(folder / "model")
    admins = _keys(folder / "admins.yaml", ADMIN_KEY, "{name: alice, role: admin}")
    callers = _keys(folder / "callers.yaml", RED_KEY, "{team: red}")
    more = ["--admin-keys", str(admins), "--state-dir", str(folder / "state")]
    more += ["--api-key-labels", str(callers), *OPTIONS, *PLACES[getattr(request, "param", EAGER)]]
    environment = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with serving(
        folder / "server", folder / "model", *more, policies=POLICIES, environment=environment
    ) as running:
        yield running


@pytest.fixture(scope="package")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=120) as client:
        yield client
