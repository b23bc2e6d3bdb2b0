"""`GET /guard/v1/experts`: what the engine core counted, for people with a key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from guard_vllm.admin import routes
from guard_vllm.admin.keys import AdminKeys
from guard_vllm.core_load import CORE_LOAD_METHOD

from guard.errors import ReloadRefusedError
from guard.events.load import ExpertCounts, LayerCounts, encode_counts
from guard.events.message import LayerLoad

COUNTED = ExpertCounts(
    6, 8, [LayerCounts(3, [6, 0], LayerLoad(3, 1.0, 0.0, 1.0, 0.25)), LayerCounts(4, [0, 0])]
)
VIEWER = {"Authorization": "Bearer look"}


class Reloader:
    """Asks nobody."""

    def __init__(self) -> None:
        self.fault = False
        self.engines = 1

    def ask(self, method: str) -> list[bytes]:
        assert method == CORE_LOAD_METHOD
        if self.fault:
            raise ReloadRefusedError("the engine did not answer")
        return [encode_counts(COUNTED)] * self.engines


@pytest.fixture
def reloader() -> Reloader:
    return Reloader()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reloader: Reloader) -> TestClient:
    keys = tmp_path / "keys.yaml"
    keys.write_text("look: {name: alice, role: viewer}\n")
    context: Any = SimpleNamespace(keys=AdminKeys.read(keys), reloader=reloader)
    monkeypatch.setattr(routes, "admin_context", lambda: context)
    app = FastAPI()
    app.include_router(routes.build_router())
    return TestClient(app)


def test_a_viewer_gets_counts_by_logical_id_and_what_they_come_to(client: TestClient) -> None:
    answer = client.get("/guard/v1/experts", headers=VIEWER)

    assert answer.status_code == 200
    used = {"effective_experts": 1.0, "entropy_nats": 0.0, "max_share": 1.0, "divergence_nats": 0.25}
    assert answer.json() == {
        "tokens": 6,
        "sampled_every": 8,
        "layers": [
            {"layer": 3, "counts": [6, 0]} | used,
            {"layer": 4, "counts": [0, 0]} | dict.fromkeys(used),
        ],
    }


def test_counts_of_several_engines_are_summed_up(client: TestClient, reloader: Reloader) -> None:
    reloader.engines = 2
    answer = client.get("/guard/v1/experts", headers=VIEWER).json()
    assert answer["tokens"] == 12
    assert [layer["counts"] for layer in answer["layers"]] == [[12, 0], [0, 0]]
    assert [layer["effective_experts"] for layer in answer["layers"]] == [1.0, None]
    assert {layer["divergence_nats"] for layer in answer["layers"]} == {None}


def test_nobody_else_gets_any(client: TestClient) -> None:
    assert client.get("/guard/v1/experts").status_code == 401
    assert client.get("/guard/v1/experts", headers={"Authorization": "Bearer x"}).status_code == 401


def test_an_engine_that_does_not_answer_is_said_so(client: TestClient, reloader: Reloader) -> None:
    reloader.fault = True
    answer = client.get("/guard/v1/experts", headers=VIEWER)
    assert answer.status_code == 409
    assert "did not answer" in answer.text
