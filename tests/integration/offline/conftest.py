"""Engines that several tests look at, each started once a session."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import Engines, write_inputs
from tests.support.tiny_models import write_tiny_dense, write_tiny_moe


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("offline")
    write_tiny_moe(folder / "moe")
    write_tiny_dense(folder / "dense")
    write_inputs(folder)
    return Engines(folder)
