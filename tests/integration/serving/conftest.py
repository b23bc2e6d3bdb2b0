"""Engines that guess ahead, that schedule ahead, and plain ones to compare them with."""

from __future__ import annotations

import pytest

from tests.integration.offline.engines import write_inputs
from tests.integration.serving.engines import ServingEngines, write_draft
from tests.integration.serving.lives import LifeEngines, write_lives
from tests.support.tiny_models import write_tiny_moe


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> ServingEngines:
    folder = tmp_path_factory.mktemp("serving")
    write_tiny_moe(folder / "moe")
    write_draft(folder / "moe", folder / "draft")
    write_inputs(folder)
    return ServingEngines(folder)


@pytest.fixture(scope="session")
def life_engines(tmp_path_factory: pytest.TempPathFactory) -> LifeEngines:
    folder = tmp_path_factory.mktemp("lives")
    write_lives(folder)
    return LifeEngines(folder)
