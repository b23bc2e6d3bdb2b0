"""Where policies and overrides meet: each change takes effect over what the other left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from guard.failures import Failures, Stage
from guard.overrides.apply import apply_overrides, check_new_modes
from guard.overrides.model import OverrideError, Overrides
from guard.overrides.store import OverrideStore
from guard.policy import PolicySet, PolicyTexts, load_texts

LOOK_SECONDS: Final = 0.5
"""How late a mask may end."""


class Result(Protocol):
    """What became of a policy set."""

    @property
    def revision(self) -> str: ...

    @property
    def fault(self) -> str | None:
        """Why it is not in force."""


PutInForce = Callable[[Callable[[], PolicySet]], Result]
"""Loads a set and puts it in force in all engines, or says why not."""


class Desk:
    """One a process; several processes share a store. Safe to call from any thread; calls wait for the
    engines."""

    def __init__(self, store: OverrideStore, put_in_force: PutInForce) -> None:
        self._store = store
        self._put_in_force = put_in_force
        self._loaded: tuple[PolicyTexts, PolicySet] | None = None  # the last ones

    def take(self, texts: PolicyTexts) -> Result:
        """Another policy set, under the overrides that there are. Raises OverrideError."""
        with self._store.locked():
            overrides = self._store.read()
            result = self._put_in_force(lambda: apply_overrides(self._load(texts), overrides))
            if result.fault is None:
                self._store.keep_texts(texts)
            return result

    def keep(self, texts: PolicyTexts) -> None:
        """They are in force already. Raises OverrideError."""
        with self._store.locked():
            if self._store.texts() != texts:
                self._store.keep_texts(texts)

    def revision_of(self, texts: PolicyTexts) -> str:
        """Of the set under the overrides that there are. Raises PolicyError, OverrideError."""
        return apply_overrides(self._load(texts), self._store.read()).revision

    def change(self, edit: Callable[[Overrides], Overrides]) -> tuple[Overrides, Result]:
        """Other overrides over the policies in force; what is refused is not kept.

        edit: gets those that there are, and may raise OverrideError

        Raises OverrideError.
        """
        with self._store.locked():
            before = self._store.read()
            changed = edit(before)
            texts = self._store.texts()
            if texts is None:
                raise OverrideError(
                    f"{self._store.folder} does not say which policies are in force; restart the "
                    "server with this state folder"
                )
            policies = self._load(texts)
            check_new_modes(policies, before, changed)
            result = self._put_in_force(lambda: apply_overrides(policies, changed))
            if result.fault is None:
                try:
                    self._store.write(changed)
                except OverrideError:
                    # Nobody could see or lift what is in force and not kept.
                    self._put_in_force(lambda: apply_overrides(policies, before))
                    raise
            return changed, result

    def end_expired(self) -> list[str]:
        """The ids of masks whose time is over, which are lifted. Raises OverrideError."""
        now = time.time()
        end = self._store.read().next_end()
        if end is None or end > now:
            return []
        ended: list[str] = []

        def edit(overrides: Overrides) -> Overrides:
            ended[:] = [mask.id for mask in overrides.masks if mask.is_over(now)]
            return overrides.without_expired(now)

        _, result = self.change(edit)
        if result.fault is not None:
            raise OverrideError(f"masks whose time is over could not be lifted: {result.fault}")
        for mask_id in ended:
            self._store.audit("moe-guard", "unmask", "its time is over", "done", mask=mask_id)
        return ended

    def _load(self, texts: PolicyTexts) -> PolicySet:
        """Parsed once: it takes longer than all else of an operator's change. Raises PolicyError."""
        last = self._loaded
        if last is None or last[0] != texts:
            last = self._loaded = (texts, load_texts(texts))
        return last[1]


class Expiry:
    """The thread that lifts masks whose time is over. A fault is counted, and the next turn comes."""

    def __init__(self, desk: Desk, failures: Failures) -> None:
        self._desk = desk
        self._failures = failures
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-guard-expiry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            with self._failures.caught(Stage.RELOAD):
                self._desk.end_expired()
