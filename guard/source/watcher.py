"""The thread that notices changed policies and has them put in force."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final, NoReturn, Protocol

from guard.failures import Failures, Stage
from guard.policy import PolicyError, PolicySet, PolicyTexts, load_texts
from guard.source.source import Source

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0


class Result(Protocol):
    """What became of a policy set."""

    @property
    def fault(self) -> str | None:
        """Why it is not in force."""


class Overlay(Protocol):
    """What lies over the policies as they are written."""

    def revision_of(self, texts: PolicyTexts) -> str:
        """Of the set under the overlay. Raises PolicyError."""

    def take(self, texts: PolicyTexts) -> Result:
        """Put the set in force under the overlay."""

    def keep(self, texts: PolicyTexts) -> None:
        """The set is in force already."""


class PolicyWatcher:
    """Polls a source, and hands over each set whose content is not the one in force.

    apply: puts in force what it is given to load; counts and logs the attempt. A PolicyError that the
        load raises is a refusal. Called in the watcher's thread only
    in_force: the revision that the engines run
    overlay: takes sets that were read in the place of `apply`

    A fault of the watcher itself is counted and logged, and the next turn comes all the same.
    """

    def __init__(
        self,
        source: Source,
        apply: Callable[[Callable[[], PolicySet]], Result],
        in_force: Callable[[], str],
        failures: Failures,
        overlay: Overlay | None = None,
    ) -> None:
        self._source = source
        self._overlay = overlay
        self._apply = apply
        self._in_force = in_force
        self._failures = failures
        # A SimpleQueue because a signal handler may put into one, whatever it interrupts.
        self._wishes: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: look now; False: stop
        self._unread: str | None = None  # why the last poll got no set
        self._is_refused = False  # the set that was read last is not in force
        self._is_unfinished = False  # the last turn ended in a fault of ours: read again
        self._thread = threading.Thread(target=self._run, name="moe-guard-policies", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def trigger(self) -> None:
        """Look now, changed or not. Never blocks; for signal handlers too."""
        self._wishes.put(True)

    def stop(self) -> None:
        """A reload that is under way ends first."""
        self._wishes.put(False)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        is_asked = False
        while True:
            with self._failures.caught(Stage.RELOAD):
                self.turn(is_asked=is_asked)
            try:
                is_asked = self._wishes.get(timeout=self._source.delay_s())
            except queue.Empty:
                is_asked = False
            else:
                if not is_asked:
                    return

    def turn(self, *, is_asked: bool = False) -> None:
        """One look at the source. is_asked: somebody waits for the answer."""
        force = is_asked or self._is_unfinished
        self._is_unfinished = True
        self._look(force=force, is_asked=is_asked)
        self._is_unfinished = False

    def _look(self, *, force: bool, is_asked: bool) -> None:
        try:
            texts = self._source.poll(force=force)
        except PolicyError as error:
            if is_asked or str(error) != self._unread:  # else it was told
                self._unread = str(error)
                self._refuse(error)
            return
        if self._unread is not None:
            self._unread = None
            logger.info("policies can be read again: %s", self._source.name)
        if texts is None:
            return
        try:
            overlay = self._overlay
            found = load_texts(texts).revision if overlay is None else overlay.revision_of(texts)
        except PolicyError as error:
            self._is_refused = True
            self._refuse(error)
            return
        revision = self._in_force()
        if found != revision:
            self._put_in_force(texts)
            return
        self._keep()  # of a bundle, that this one is in force now
        if overlay is not None:
            overlay.keep(texts)
        if is_asked or self._is_refused:
            self._is_refused = False
            logger.info("policies unchanged: %s has revision %s", self._source.name, revision)

    def _put_in_force(self, texts: PolicyTexts) -> None:
        overlay = self._overlay
        result = self._apply(lambda: load_texts(texts)) if overlay is None else overlay.take(texts)
        self._is_refused = result.fault is not None
        if not self._is_refused:
            self._keep()

    def _keep(self) -> None:
        try:
            self._source.keep()
        except PolicyError as error:
            logger.warning("the policies in force are not kept for the next start: %s", error)

    def _refuse(self, error: PolicyError) -> None:
        def load() -> NoReturn:
            raise error

        self._apply(load)
