"""A server as far as its policies go: the real watcher, over whatever it is given to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from guard.failures import Failures
from guard.policy import PolicyError, PolicySet, PolicyTexts, load_texts
from guard.source.source import Source
from guard.source.watcher import PolicyWatcher


class _Result(NamedTuple):
    fault: str | None


class _Given:
    """A source that reads what it is told to."""

    name = "given"

    def __init__(self) -> None:
        self.read: Callable[[], PolicyTexts]

    def poll(self, *, force: bool = False) -> PolicyTexts | None:
        return self.read()

    def keep(self) -> None:
        """Nothing: it was given."""

    def delay_s(self) -> float:
        return 1.0


class PolicyServer:
    def __init__(self, texts: PolicyTexts) -> None:
        """texts: in force at first"""
        self.in_force = load_texts(texts)
        self._fault: PolicyError | None = None
        self._given = _Given()
        self._watcher = self._watch(self._given)

    def state(self) -> object:
        return self.in_force.revision

    def take(self, read: Callable[[], PolicyTexts]) -> PolicySet:
        """What is then in force. Raises PolicyError for texts that are refused."""
        self._given.read = read
        return self._turn(self._watcher)

    def take_from(self, source: Source) -> PolicySet:
        """The same, with what the source keeps."""
        return self._turn(self._watch(source))

    def _watch(self, source: Source) -> PolicyWatcher:
        return PolicyWatcher(source, self._apply, lambda: self.in_force.revision, Failures())

    def _turn(self, watcher: PolicyWatcher) -> PolicySet:
        self._fault = None
        watcher.turn(is_asked=True)
        if self._fault is not None:
            raise self._fault
        return self.in_force

    def _apply(self, load: Callable[[], PolicySet]) -> _Result:
        try:
            self.in_force = load()
        except PolicyError as error:
            self._fault = error
            return _Result(str(error))
        return _Result(None)
