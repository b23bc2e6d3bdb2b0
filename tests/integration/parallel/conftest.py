"""Pairs of engines that several tests look at, each started once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.frontend.tiny_model import write_tiny_model
from tests.integration.offline.engines import write_inputs
from tests.integration.parallel.engines import RANKS, SHIM, EnginePairs
from tests.integration.server.conftest import ADMIN_KEY, Server, serving
from tests.support.tiny_models import write_tiny_moe


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> EnginePairs:
    folder = tmp_path_factory.mktemp("data_parallel")
    write_tiny_moe(folder / "moe")
    write_inputs(folder)
    return EnginePairs(folder)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started as an operator starts it: two engines, and as many API servers."""
    folder = tmp_path_factory.mktemp("server")
    write_tiny_model(folder / "model")
    keys = folder / "keys.yaml"
    keys.write_text(f"{ADMIN_KEY}: {{name: alice, role: admin}}\n")
    keys.chmod(0o600)
    with serving(
        folder,
        folder / "model",
        *("--data-parallel-size", str(RANKS), "--label-header", "tenant=X-Tenant"),
        *("--admin-keys", str(keys), "--state-dir", str(folder / "state")),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        python_path=[SHIM],
    ) as running:
        yield running
