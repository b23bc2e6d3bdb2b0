"""Where a server's processes find their policies, and which of them watches for others."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guard_vllm import hangup, watching
from guard_vllm.policies import find_policies, load_in_worker, source_to_watch, texts_now
from guard_vllm.settings import Settings

from guard.failures import Failures
from guard.policy import PolicyError, PolicySet
from guard.source.files import FileSource
from guard.source.remote import BundleSource
from tests.unit.source.signing import OWN, key_file, signed
from tests.unit.source.test_remote import Host, host
from tests.unit.source.writing import bundle, policy, write

__all__ = ["host"]  # a fixture

SOON_S = 10.0


def names(loaded: PolicySet) -> list[str]:
    return [policy.name for policy in loaded.policies]


def test_a_bundle_is_fetched_once_for_all_processes_of_a_server(host: Host, tmp_path: Path) -> None:
    settings = Settings(policies=host.url, bundle_cache=str(tmp_path))
    host.publish(bundle(a=policy("a")))
    found = find_policies(settings)
    found.keep()
    host.publish(bundle(b=policy("b")))

    assert names(found.policies) == ["a"]
    assert names(load_in_worker(settings)) == ["a"]


def test_a_process_that_another_started_takes_what_that_one_found(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(policies=host.url, bundle_cache=str(tmp_path))
    host.publish(bundle(a=policy("a")))
    find_policies(settings).keep()
    host.publish(bundle(b=policy("b")))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())

    assert names(find_policies(settings).policies) == ["a"]


def test_a_bundle_that_does_not_fit_is_not_kept_for_the_next_start(host: Host, tmp_path: Path) -> None:
    settings = Settings(policies=host.url, bundle_cache=str(tmp_path))
    host.publish(bundle(a=policy("a")))

    find_policies(settings)  # what was found is kept by who finds it good

    assert list(tmp_path.iterdir()) == []


def test_an_address_that_cannot_be_used_is_refused_before_a_worker_starts() -> None:
    with pytest.raises(PolicyError, match="is not encrypted"):
        find_policies(Settings(policies="http://example.org/b.tar.gz"))


@pytest.mark.parametrize(
    ("settings", "kind", "seconds"),
    [
        (Settings(policies="p"), FileSource, 1.0),
        (Settings(policies="p", reload_seconds=5), FileSource, 5.0),
        (Settings(policies="https://h/b.tar.gz"), BundleSource, 30.0),
        (Settings(policies="https://h/b.tar.gz", reload_seconds=5), BundleSource, 5.0),
        (Settings(policies="https://h/b.tar.gz", bundle_sha256="0" * 64), None, 0.0),
        (Settings(policies="p", reload=False), None, 0.0),
    ],
    ids=["file", "file, slower", "bundle", "bundle, faster", "pinned bundle", "no reload"],
)
def test_what_is_watched_and_how_often(settings: Settings, kind: type | None, seconds: float) -> None:
    source = source_to_watch(settings)

    assert (None if source is None else type(source)) == kind
    if source is not None:
        assert source.delay_s() == pytest.approx(seconds, rel=0.11)


def test_a_digest_behind_the_url_pins_the_bundle(host: Host, tmp_path: Path) -> None:
    good = bundle(a=policy("a"))
    host.publish(good)
    pin = f"#sha256={hashlib.sha256(good).hexdigest()}"
    settings = Settings(policies=host.url + pin, bundle_cache=str(tmp_path))

    found = find_policies(settings)
    found.keep()
    assert names(found.policies) == names(load_in_worker(settings)) == ["a"]
    assert source_to_watch(settings) is None
    host.publish(bundle(b=policy("b")))
    with pytest.raises(PolicyError, match="has the SHA-256"):
        find_policies(Settings(policies=host.url + pin, bundle_cache=str(tmp_path / "other")))


@pytest.mark.parametrize("place", ["url", "file"])
def test_with_a_key_a_server_starts_and_goes_on_with_signed_bundles_alone(
    host: Host, tmp_path: Path, place: str
) -> None:
    file = tmp_path / "b.json"
    settings = Settings(
        policies=host.url if place == "url" else str(file),
        policy_key=str(key_file(tmp_path, OWN)),
        bundle_cache=str(tmp_path / "cache"),
        state_dir=str(tmp_path / "state"),
    )

    def publish(content: bytes) -> None:
        file.write_bytes(content)
        host.publish(content)

    publish(bundle(a=policy("a")))
    with pytest.raises(PolicyError, match="is not signed"):
        find_policies(settings)
    publish(signed(2, a=policy("a")))
    found = find_policies(settings)
    found.keep()
    source = source_to_watch(settings)
    publish(signed(1, b=policy("b")))

    assert names(found.policies) == names(load_in_worker(settings)) == ["a"]
    assert source is not None
    assert source.delay_s() == pytest.approx(30.0 if place == "url" else 1.0, rel=0.11)
    with pytest.raises(PolicyError, match="has serial 1, older than 2"):
        source.poll()
    assert names(find_policies(settings).policies) == ["a"], "the last one, while the next is refused"
    with pytest.raises(PolicyError, match="has serial 1, older than 2"):
        texts_now(settings)  # who asks for a reload is told so


def test_a_folder_is_nothing_that_is_signed(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a=policy("a"))
    settings = Settings(policies=str(folder), policy_key=str(key_file(tmp_path, OWN)))
    with pytest.raises(PolicyError, match="give the file of a signed bundle"):
        find_policies(settings)


def test_without_a_state_folder_the_watcher_knows_what_the_server_started_with(
    host: Host, tmp_path: Path
) -> None:
    settings = Settings(
        policies=host.url,
        policy_key=str(key_file(tmp_path, OWN)),
        bundle_cache=str(tmp_path / "cache"),
    )
    host.publish(signed(2, a=policy("a")))
    find_policies(settings).keep()
    host.publish(signed(1, b=policy("b")))

    source = source_to_watch(settings)
    assert source is not None
    with pytest.raises(PolicyError, match="older than 2"):
        source.poll()


class Bus:
    def __init__(self) -> None:
        self.revision = "000000000000"
        self.failures = Failures()


class Engine:
    def __init__(self) -> None:
        self.shutdowns = 0

    def shutdown(self) -> None:
        self.shutdowns += 1


@dataclass
class Result:
    fault: str | None = None


class Reloader:
    def __init__(self, bus: Bus, *, watches: bool = True) -> None:
        self.bus = bus
        self.watches = watches
        self.applied = threading.Semaphore(0)

    def apply(self, load: Callable[[], PolicySet]) -> Result:
        self.bus.revision = load().revision
        self.applied.release()
        return Result()


def watch(engine: Engine, settings: Settings | None, bus: Bus) -> None:
    watching.watch_policies(engine, settings, bus)  # type: ignore[arg-type]


def test_the_api_server_that_reloads_watches_until_its_engine_is_shut_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bus, engine = write(tmp_path, a=policy("a")), Bus(), Engine()
    reloader = Reloader(bus)
    monkeypatch.setattr(watching, "reloader", lambda: reloader)
    settings = Settings(policies=str(folder), reload_seconds=3600.0)
    try:
        watch(engine, settings, bus)
        watch(engine, settings, bus)  # vLLM asks its engines more than once
        assert len(hangup.listeners) == 1
        assert reloader.applied.acquire(timeout=SOON_S)
        write(folder, a=policy("b"))
        hangup.listeners[0]()
        assert reloader.applied.acquire(timeout=SOON_S)
    finally:
        engine.shutdown()
        engine.shutdown()
    assert (hangup.listeners, engine.shutdowns) == ([], 2)


@pytest.mark.parametrize(
    ("reloader", "settings"),
    [
        (None, Settings(policies="p")),
        (Reloader(Bus(), watches=False), Settings(policies="p")),
        (Reloader(Bus()), Settings(policies="p", reload=False)),
        (Reloader(Bus()), None),
    ],
    ids=["unguarded", "another's task", "no reload", "off"],
)
def test_nobody_else_watches(
    monkeypatch: pytest.MonkeyPatch, reloader: Any, settings: Settings | None
) -> None:
    monkeypatch.setattr(watching, "reloader", lambda: reloader)

    watch(Engine(), settings, Bus())

    assert hangup.listeners == []
