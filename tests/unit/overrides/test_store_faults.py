"""The state folder fails while a server runs: what is in force and what is kept stay the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NoReturn

import pytest

from guard.failures import Failures, Stage
from guard.overrides import desk as desk_module
from guard.overrides.desk import Desk, Expiry
from guard.overrides.model import OverrideError, Overrides
from guard.overrides.store import OverrideStore
from tests.support.drills import drilling
from tests.unit.overrides.test_overrides import Engines, policies, texts

SOON_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> OverrideStore:
    made = OverrideStore(tmp_path / "state")
    made.keep_texts(texts())
    return made


def mask(overrides: Overrides) -> Overrides:
    return overrides.with_mask([(1, 2)], by="alice", reason="an incident")[0]


def refuse(*_: object) -> NoReturn:
    raise OverrideError("the state folder cannot be used (No space left on device)")


def test_a_change_that_cannot_be_kept_is_not_in_force_either(
    store: OverrideStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines()
    desk = Desk(store, engines.put)
    with monkeypatch.context() as patch:
        patch.setattr(OverrideStore, "write", refuse)
        with pytest.raises(OverrideError, match="No space left"):
            desk.change(mask)
    assert engines.in_force.revision == policies().revision
    assert store.read() == Overrides()

    desk.change(mask)
    assert engines.in_force.revision != policies().revision


def test_a_folder_that_is_gone_refuses_changes_and_leaves_everything_in_force(
    store: OverrideStore,
) -> None:
    engines = Engines()
    desk = Desk(store, engines.put)
    desk.change(mask)
    masked = engines.in_force.revision
    moved = store.folder.rename(store.folder.with_name("moved"))
    store.folder.write_text("in the way")
    with pytest.raises(OverrideError, match=r"the state folder .* cannot be used"):
        desk.change(lambda _: Overrides())
    assert engines.in_force.revision == masked

    store.folder.unlink()
    moved.rename(store.folder)
    desk.change(lambda _: Overrides())
    assert engines.in_force.revision == policies().revision


@pytest.mark.parametrize("fault", ["a drill", "a folder in the way"])
def test_the_thread_that_ends_masks_counts_a_fault_and_goes_on(
    store: OverrideStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(desk_module, "LOOK_SECONDS", 0.01)
    looks, enough = [0], threading.Event()

    class Counting(Failures):
        def note(self, stage: Stage, error: BaseException) -> None:
            super().note(stage, error)
            looks[0] += 1
            if looks[0] == 3:
                enough.set()

    failures = Counting()
    if fault == "a folder in the way":
        store.folder.rename(store.folder.with_name("moved"))
        store.folder.write_text("in the way")
    expiry = Expiry(Desk(store, Engines().put), failures)
    with drilling("reload@*" if fault == "a drill" else "record@1"):
        expiry.start()
        assert enough.wait(SOON_S)
        expiry.stop()
        expiry._thread.join(SOON_S)
    assert failures.count.keys() == {Stage.RELOAD}
