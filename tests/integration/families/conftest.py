"""Engines of every router family, each started once a session."""

from __future__ import annotations

import pytest

from tests.integration.families.engines import FamilyEngines


@pytest.fixture(scope="session")
def family_engines(tmp_path_factory: pytest.TempPathFactory) -> FamilyEngines:
    return FamilyEngines(tmp_path_factory.mktemp("families"))
