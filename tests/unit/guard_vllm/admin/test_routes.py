"""`/guard/v1` as its callers see it: who may, what is refused and why, what is written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from guard_vllm.admin import context as admin
from guard_vllm.admin.context import AdminContext
from guard_vllm.admin.endpoint import AdminEndpoint
from guard_vllm.admin.keys import AdminKeyError, AdminKeys
from guard_vllm.settings import Settings
from prometheus_client import CollectorRegistry

from guard.events.bus import EventBus
from guard.events.message import Health, Hello, RuleFacts, encode
from guard.events.metrics import GuardMetrics
from guard.overrides.desk import Desk
from guard.overrides.store import AUDIT, OverrideStore
from guard.policy import PolicyError, PolicySet, read_policies
from tests.unit.overrides.test_overrides import POLICY, Engines, Result
from tests.unit.source.signing import OWN, key_file

ADMIN = {"Authorization": "Bearer admin-key"}
VIEWER = {"Authorization": "Bearer viewer-key"}
KEYS = "admin-key: {name: alice, role: admin}\nviewer-key: {name: bob, role: viewer}\n"
MASK = {"experts": ["L1/E2"], "reason": "an incident"}


class Reloader:
    watches = True

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def apply(self, load: Callable[[], PolicySet]) -> Result:
        return self._engines.put(load)


@pytest.fixture
def store(tmp_path: Path) -> OverrideStore:
    return OverrideStore(tmp_path / "state")


@pytest.fixture
def client(
    tmp_path: Path, store: OverrideStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "a.yaml").write_text(POLICY.replace("NAME", "a"))
    (tmp_path / "keys.yaml").write_text(KEYS)
    engines = Engines()
    store.keep_texts(read_policies(tmp_path / "policies"))
    bus = EventBus(GuardMetrics("m", CollectorRegistry()), "m")
    rule = RuleFacts("a", "r", "enforce", "high", "block", "any", "why", "", "open", ("count",), (3.0,))
    bus.receive(encode(Hello(0, "abc", ("a",), (rule,), (), {}, 0, live=True)))
    reloader = Reloader(engines)
    settings = Settings(policies=str(tmp_path / "policies"), state_dir=str(store.folder))
    made = AdminContext(
        settings=settings,
        bus=bus,
        store=store,
        desk=Desk(store, engines.put),
        reloader=reloader,  # type: ignore[arg-type]
        keys=AdminKeys.read(tmp_path / "keys.yaml"),
    )
    monkeypatch.setattr(admin, "_contexts", [made])
    app = FastAPI()
    AdminEndpoint().attach_router(app)
    with TestClient(app) as http:
        yield http


def audit(store: OverrideStore) -> list[dict[str, object]]:
    return [json.loads(line) for line in (store.folder / AUDIT).read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/status", None),
        ("GET", "/policies", None),
        ("GET", "/events", None),
        ("GET", "/masks", None),
        ("POST", "/masks", MASK),
        ("DELETE", "/masks/mask-1", None),
        ("POST", "/reload", {"reason": "r"}),
        ("PUT", "/kill-switch", {"on": True, "reason": "r"}),
        ("PUT", "/policies/a/mode", {"mode": "off", "reason": "r"}),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic admin-key"},
        {"Authorization": "admin-key"},
        {"Authorization": "Bearer "},
    ],
    ids=["none", "wrong", "basic", "no scheme", "empty"],
)
def test_without_a_key_nothing_is_shown_or_done(
    client: TestClient,
    store: OverrideStore,
    method: str,
    path: str,
    body: object,
    headers: dict[str, str],
) -> None:
    answer = client.request(method, f"/guard/v1{path}", json=body, headers=headers)
    assert answer.status_code == 401
    assert "admin-key" not in answer.text
    assert not store.read().masks


def test_two_keys_are_none(client: TestClient) -> None:
    headers = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer admin-key")]
    assert client.get("/guard/v1/status", headers=headers).status_code == 401


def test_who_may_only_look_changes_nothing(client: TestClient, store: OverrideStore) -> None:
    assert client.get("/guard/v1/masks", headers=VIEWER).json() == []
    for method, path, body in (
        ("POST", "/masks", MASK),
        ("DELETE", "/masks/mask-1", None),
        ("POST", "/reload", {"reason": "r"}),
        ("PUT", "/kill-switch", {"on": True, "reason": "r"}),
        ("PUT", "/policies/a/mode", {"mode": "off", "reason": "r"}),
    ):
        answer = client.request(method, f"/guard/v1{path}", json=body, headers=VIEWER)
        assert answer.status_code == 403, path
    assert store.read().masks == ()


def test_without_admin_keys_the_routes_are_not_there(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_contexts", [])
    assert client.get("/guard/v1/status", headers=ADMIN).status_code == 404


def test_an_expert_is_blocked_now_and_let_back(client: TestClient, store: OverrideStore) -> None:
    before = client.get("/guard/v1/status", headers=VIEWER).json()
    made = client.post("/guard/v1/masks", json=MASK | {"duration": "2h"}, headers=ADMIN)
    assert made.status_code == 201
    mask = made.json()["mask"]
    assert (mask["id"], mask["experts"], mask["by"]) == ("mask-1", ["L1/E2"], "alice")
    assert made.json()["revision"] != before["revision"]
    assert client.get("/guard/v1/masks", headers=VIEWER).json() == [mask]
    assert client.get("/guard/v1/status", headers=VIEWER).json()["masks"] == [mask]
    lifted = client.delete("/guard/v1/masks/mask-1?reason=over", headers=ADMIN)
    assert lifted.status_code == 200
    assert client.get("/guard/v1/masks", headers=VIEWER).json() == []
    written = [(line["by"], line["what"], line["reason"], line["outcome"]) for line in audit(store)]
    assert written == [
        ("alice", "mask", "an incident", "done"),
        ("alice", "unmask", "over", "done"),
    ]


def test_a_mask_that_cannot_be_honoured_is_a_conflict_that_says_why(
    client: TestClient, store: OverrideStore
) -> None:
    answer = client.post("/guard/v1/masks", json=MASK | {"experts": ["L1/E0-6"]}, headers=ADMIN)
    assert answer.status_code == 409
    assert "layer 1" in answer.text
    assert store.read().masks == ()
    assert str(audit(store)[0]["outcome"]).startswith("refused: ")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (MASK | {"experts": ["12/85"]}, 422),
        (MASK | {"experts": []}, 422),
        (MASK | {"reason": ""}, 422),
        (MASK | {"method": "force"}, 422),
        (MASK | {"duraton": "2h"}, 422),
        (MASK | {"duration": "soon"}, 400),
        (MASK | {"duration": "91d"}, 400),
        (MASK | {"labels": {"a": "b"}, "request": "c"}, 400),
        (MASK | {"experts": ["L9/E0"]}, 409),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    client: TestClient, store: OverrideStore, body: dict[str, object], code: int
) -> None:
    assert client.post("/guard/v1/masks", json=body, headers=ADMIN).status_code == code
    assert store.read().masks == ()


def test_modes_the_kill_switch_and_what_is_not_there(client: TestClient, store: OverrideStore) -> None:
    put = client.put("/guard/v1/policies/a/mode", json={"mode": "off", "reason": "r"}, headers=ADMIN)
    assert put.status_code == 200
    assert client.get("/guard/v1/status", headers=VIEWER).json()["modes"] == {"a": "off"}
    other = client.put("/guard/v1/policies/b/mode", json={"mode": "off", "reason": "r"}, headers=ADMIN)
    assert other.status_code == 404
    assert client.delete("/guard/v1/masks/mask-9", headers=ADMIN).status_code == 404
    client.put("/guard/v1/kill-switch", json={"on": True, "reason": "r"}, headers=ADMIN)
    assert client.get("/guard/v1/status", headers=VIEWER).json()["kill_switch"] is True
    back = client.put("/guard/v1/policies/a/mode", json={"mode": None, "reason": "r"}, headers=ADMIN)
    assert back.status_code == 200
    assert store.read().modes == {}


def test_status_says_what_the_engines_said_last(client: TestClient) -> None:
    found = client.get("/guard/v1/status", headers=VIEWER).json()
    assert (found["up"], found["revision"], found["policies"]) == (True, "abc", ["a"])
    admin._contexts[0].bus.receive(encode(Health(0, up=False, blind_layers=2)))
    found = client.get("/guard/v1/status", headers=VIEWER).json()
    assert found["up"] is False
    assert found["engines"] == [{"engine": 0, "revision": "abc", "live": False, "blind_layers": 2}]
    [policy] = client.get("/guard/v1/policies", headers=VIEWER).json()["policies"]
    assert policy["rules"][0]["thresholds"] == [3.0]


def test_a_bad_policy_file_does_not_keep_an_operator_from_masking(
    client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "policies" / "a.yaml").write_text("kind: Policy\n")
    assert client.post("/guard/v1/masks", json=MASK, headers=ADMIN).status_code == 201
    assert client.post("/guard/v1/reload", json={"reason": "r"}, headers=ADMIN).status_code == 409


def test_a_source_that_cannot_be_trusted_is_a_conflict_and_counts_as_a_refused_reload(
    client: TestClient, store: OverrideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def apply(load: Callable[[], PolicySet]) -> Result:
        with pytest.raises(PolicyError) as caught:
            load()
        asked.append(str(caught.value))
        return Result("", str(caught.value))

    key = key_file(tmp_path, OWN)
    policies = tmp_path / "policies" / "a.yaml"
    settings = Settings(policies=str(policies), policy_key=str(key), state_dir=str(store.folder))
    context = replace(admin._contexts[0], settings=settings)
    monkeypatch.setattr(context.reloader, "apply", apply)
    monkeypatch.setattr(admin, "_contexts", [context])

    answer = client.post("/guard/v1/reload", json={"reason": "r"}, headers=ADMIN)

    assert answer.status_code == 409
    assert "is not signed, and policy_key takes nothing else" in answer.text
    assert len(asked) == 1
    assert str(audit(store)[0]["outcome"]).startswith("refused: ")


def test_the_description_names_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    wanted = ("status", "policies", "events", "reload", "masks", "kill-switch")
    assert {f"/guard/v1/{path}" for path in wanted} <= set(paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k: {name: a, role: root}", "a `role`, which is viewer or admin"),
        ("k: {name: a}", "a `name` and a `role`"),
        ("k: {name: '', role: admin}", "a `name` and a `role`"),
        ("{}", "holds no key"),
    ],
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(AdminKeyError, match=message):
        AdminKeys.read(tmp_path / "keys.yaml")


def test_a_state_folder_that_cannot_be_used_refuses_changes_and_says_why(
    client: TestClient, store: OverrideStore
) -> None:
    moved = store.folder.rename(store.folder.with_name("moved"))
    store.folder.write_text("in the way")
    refused = client.post("/guard/v1/masks", json=MASK, headers=ADMIN)
    assert refused.status_code == 400
    assert "the state folder" in refused.json()["detail"]
    assert client.get("/guard/v1/masks", headers=VIEWER).status_code == 500

    store.folder.unlink()
    moved.rename(store.folder)
    assert client.get("/guard/v1/masks", headers=VIEWER).json() == []
    assert client.post("/guard/v1/masks", json=MASK, headers=ADMIN).status_code == 201


def test_a_change_that_cannot_be_audited_is_made_logged_and_counted_as_a_fault(
    client: TestClient, store: OverrideStore, caplog: pytest.LogCaptureFixture
) -> None:
    (store.folder / AUDIT).mkdir()
    assert client.post("/guard/v1/masks", json=MASK, headers=ADMIN).status_code == 201
    assert len(store.read().masks) == 1
    assert "mask by alice: done" in caplog.text
    assert "MoE Guard fault 1 in stage reload" in caplog.text
