"""A new program in an engine core: what an API server asks of it, between two steps.

vLLM's busy loop runs such calls where no step is being scheduled; steps that were handed to the
workers before go before, so every worker changes its program between the same two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from guard.errors import ReloadRefusedError
from guard.failures import Failures, Stage
from guard_vllm.worker import WorkerStatus
from guard_vllm.worker_reload import (
    ABANDON_METHOD,
    COMMIT_METHOD,
    PREPARE_METHOD,
    PROGRAM_METHOD,
    Answer,
)

logger = logging.getLogger(__name__)

_BROKEN = "an earlier reload left the workers with different policies; restart the server"

CORE_PROGRAM_METHOD = "moe_guard_program"
CORE_PREPARE_METHOD = "moe_guard_prepare_reload"
CORE_COMMIT_METHOD = "moe_guard_commit_reload"
CORE_ABANDON_METHOD = "moe_guard_abandon_reload"


class CoreReload:
    """Hangs on one engine core. Every call answers with a fault, for people, or with nothing.

    take: called with what the workers say of the program that has just come into force
    computed: of each request, how many positions are computed by all steps that were handed out
    """

    def __init__(
        self,
        core: Any,
        take: Callable[[list[WorkerStatus]], None],
        computed: Callable[[], dict[str, int]],
        failures: Failures,
    ) -> None:
        self._core = core
        self._failures = failures
        self._take = take
        self._computed = computed
        self._prepared: list[WorkerStatus] | None = None
        self._broken = False
        setattr(core, CORE_PROGRAM_METHOD, self.program)
        setattr(core, CORE_PREPARE_METHOD, self.prepare)
        setattr(core, CORE_COMMIT_METHOD, self.commit)
        setattr(core, CORE_ABANDON_METHOD, self.abandon)

    def program(self) -> bytes:
        """Raises ReloadRefusedError where the workers do not have the same one."""
        if self._broken:
            raise ReloadRefusedError(_BROKEN)
        found: bytes = self._rpc(PROGRAM_METHOD)[0]
        return found

    def prepare(self, program: bytes | None = None) -> str | None:
        """Begin to build it on every worker, or go on with the one that was begun; nothing changes yet.
        None: more is left to do, call again. Steps come in between."""
        self._prepared = None
        fault = self._fault_of_host()
        if fault is not None:
            return fault
        answers: list[Answer[WorkerStatus]] = self._rpc(PREPARE_METHOD, program)
        statuses = [answer.status for answer in answers if answer.status is not None]
        fault = next((answer.fault for answer in answers if answer.fault is not None), None)
        if fault is None and len(statuses) < len(answers):
            return None
        if fault is None and any(s.revision != statuses[0].revision for s in statuses):
            fault = "the workers do not have the same program"
        if fault is not None:
            self._rpc(ABANDON_METHOD, False)
            return fault
        self._prepared = statuses
        return ""

    def commit(self) -> str:
        """Put what was prepared in force on every worker."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return "nothing was prepared"
        answers: list[Answer[WorkerStatus]] = self._rpc(COMMIT_METHOD, self._computed())
        faults = [answer.fault for answer in answers if answer.fault is not None]
        if faults and len(faults) < len(answers):
            self._broken = True
            self._rpc(ABANDON_METHOD, True)
            logger.error(
                "MoE Guard's workers have different policies in force (%s): every request is unjudged "
                "until the server is restarted",
                faults[0],
            )
        if faults:
            return faults[0]
        with self._failures.caught(Stage.RELOAD) as attempt:
            self._take(prepared)
        if attempt.failed:
            self._broken = True
            self._rpc(ABANDON_METHOD, True)
            return "the engine core could not follow its workers; its log says why"
        return ""

    def abandon(self) -> None:
        """Another engine could not prepare it."""
        self._prepared = None
        self._rpc(ABANDON_METHOD, False)

    def _fault_of_host(self) -> str | None:
        parallel = self._core.vllm_config.parallel_config
        if self._broken:
            return _BROKEN
        if int(getattr(parallel, "pipeline_parallel_size", 1) or 1) > 1:
            return (
                "policies are not reloaded under pipeline parallelism yet: a rank decides about steps "
                "that are over elsewhere; restart the server"
            )
        return None

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(method, args=args)
        return answers
