"""A new program in a worker: prepared part by part and put in force, by calls of the engine core.

The calls come to each worker between the same two steps: the executor hands work out in one order.
Neither ever raises, for with several workers an answer of one would be taken for another's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from guard.errors import GuardError, ReloadRefusedError
from guard.failures import Stage
from guard.prepared import PreparedProgram
from guard.program.codec import decode_program, encode_program
from guard.program.program import Program
from guard.runtime import Guard

logger = logging.getLogger(__name__)

PROGRAM_METHOD = "moe_guard_program"
PREPARE_METHOD = "moe_guard_prepare_reload"
COMMIT_METHOD = "moe_guard_commit_reload"
ABANDON_METHOD = "moe_guard_abandon_reload"

Status = TypeVar("Status")


class Answer(NamedTuple, Generic[Status]):
    """fault: why it was not done, for people; None where it was
    status: None also where more is left to do
    """

    fault: str | None
    status: Status | None = None


class WorkerReload(Generic[Status]):
    """Hangs on one worker.

    status: what a worker says of a program, for the engine core
    """

    def __init__(self, guard: Guard, status: Callable[[Program], Status]) -> None:
        self._guard = guard
        self._status = status
        self._preparing: Iterator[PreparedProgram | None] | None = None
        self._prepared: PreparedProgram | None = None

    def hook(self, worker: object) -> None:
        setattr(worker, PROGRAM_METHOD, self.program)
        setattr(worker, PREPARE_METHOD, self.prepare)
        setattr(worker, COMMIT_METHOD, self.commit)
        setattr(worker, ABANDON_METHOD, self.abandon)

    def program(self) -> bytes:
        """The one in force, for whoever compiles the next."""
        return encode_program(self._guard.program)

    def prepare(self, data: bytes | None) -> Answer[Status]:
        """Begin to build what is in `data` beside what there is, or go on with it: a part at each call,
        as a step waits for it. There is a status once all is built."""
        with self._guard.failures.caught(Stage.RELOAD):
            try:
                if data is not None:
                    self._prepared = None
                    self._preparing = self._guard.prepare_in_parts(decode_program(data))
                if self._preparing is None:
                    raise ReloadRefusedError("nothing is being prepared")
                prepared = next(self._preparing, self._prepared)
            except GuardError as error:
                return Answer(str(error))
            if prepared is None:
                return Answer(None)
            self._prepared = prepared
            if prepared.new_bytes:
                logger.info(
                    "MoE Guard takes %.1f MiB for the evidence of cached prefixes, as these policies "
                    "count more",
                    prepared.new_bytes / 2**20,
                )
            return Answer(None, self._status(prepared.program))
        return Answer("the guard could not build it; the worker's log says why")

    def commit(self, computed: dict[str, int]) -> Answer[Status]:
        """Put in force what was prepared. computed: see `Guard.install`."""
        prepared = self._prepared
        self._forget()
        with self._guard.failures.caught(Stage.RELOAD):
            try:
                if prepared is None:
                    raise ReloadRefusedError("nothing was prepared")
                self._guard.install(prepared, computed)
            except ReloadRefusedError as error:
                return Answer(str(error))
            return Answer(None)
        return Answer("the guard could not install it; the worker's log says why")

    def abandon(self, blind: bool) -> None:
        """It is not put in force after all. blind: but on other ranks, so that none can go on."""
        self._forget()
        if blind:
            self._guard.agreement = None  # ranks that differ would wait for each other
            self._guard.is_split = self._guard.blind = True

    def _forget(self) -> None:
        self._prepared = self._preparing = None
