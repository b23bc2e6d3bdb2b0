"""A new policy set takes effect in the engines that this process speaks with, between two steps.

The set is compiled here, where no step waits for it; what the engines get is the program.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guard.errors import GuardError, ReloadRefusedError
from guard.events.bus import EventBus
from guard.policy import PolicyError, PolicySet, load_policies
from guard.program.codec import decode_program, encode_program
from guard.program.compile import check_observe_only, compile_policies
from guard.program.fingerprint import check_fingerprints
from guard.program.program import Program
from guard_vllm.compat import seam
from guard_vllm.core_reload import (
    CORE_ABANDON_METHOD,
    CORE_COMMIT_METHOD,
    CORE_PREPARE_METHOD,
    CORE_PROGRAM_METHOD,
)
from guard_vllm.settings import Settings

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 60.0
"""An engine answers between two steps; one that does not for so long is stuck, or gone."""

_RELOADER_ATTRIBUTE: Final = "moe_guard_reloader"


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """What became of a policy set.

    revision: what is in force now: of this set, or where it was refused, of the one before
    fault: why it was refused, for people; None where it is in force
    """

    revision: str
    fault: str | None = None

    @property
    def is_in_force(self) -> bool:
        return self.fault is None


Call = Callable[..., list[Any]]
"""Calls a method of each engine core, by its name, with its arguments, and waits for all answers."""


class Reloader:
    """One a process that speaks with engines. In a server the first API server's watches the policies;
    an operator's change may come to any.

    Every attempt counts in `moe_guard_reloads_total` and is logged.

    watches: this process looks for changed policies
    engines: that route one another's rows; all of them must be among those that are called
    """

    def __init__(
        self,
        call: Call,
        bus: EventBus,
        *,
        observe_only: bool,
        model: str,
        watches: bool = True,
        engines: int = 1,
    ) -> None:
        self.watches = watches
        self._call = call
        self._engines = engines
        self._bus = bus
        self._observe_only = observe_only
        self._model = model
        self._lock = threading.Lock()

    def ask(self, method: str, *args: Any) -> list[Any]:
        """What each engine core answers between two of its steps: never call it on the event loop.

        Raises ReloadRefusedError where there is no answer.
        """
        return self._call(method, *args)

    def apply(self, load: Callable[[], PolicySet]) -> ReloadResult:
        """Load a policy set and put it in force; what cannot be loaded or not be honoured is refused,
        and the one before stays. Waits until the engine has it: never call it on the event loop.

        Safe to call from any thread; one call after the other takes effect.

        load: called once, in this thread; a PolicyError of it is a refusal like any other
        """
        with self._lock:
            fault, begun, before = None, time.perf_counter(), self._bus.revision
            try:
                policies = load()
                revision = self._put_in_force(policies)
            except GuardError as error:
                fault = str(error)
                revision = self._bus.revision
            self._bus.note_reload(succeeded=fault is None)
        if fault is None:
            took_ms = (time.perf_counter() - begun) * 1e3
            logger.info(
                "policies reloaded: revision %s -> %s (%d policies) in %.0f ms",
                *(before, revision, len(policies.policies), took_ms),
            )
        else:
            logger.error("policies not reloaded, revision %s stays in force: %s", revision, fault)
        return ReloadResult(revision, fault)

    def _put_in_force(self, policies: PolicySet) -> str:
        """Its revision. Raises PolicyError, FingerprintError, ReloadRefusedError."""
        running = self._running()
        if policies.revision == running.revision:
            return running.revision
        if self._observe_only and (faults := check_observe_only(policies)):
            raise PolicyError(faults)
        program = compile_policies(policies, running.topology, running)
        check_fingerprints(policies, self._model)
        # All have prepared it before any commits: rows that it masks may come from another engine.
        answers = self._call(CORE_PREPARE_METHOD, encode_program(program))
        while None in answers and not any(answers):
            answers = self._call(CORE_PREPARE_METHOD)
        if fault := _first_fault(answers):
            self._call(CORE_ABANDON_METHOD)
            raise ReloadRefusedError(fault)
        answers = self._call(CORE_COMMIT_METHOD)
        if fault := _first_fault(answers):
            others = "" if all(answers) else "; other engines have it in force: restart the server"
            raise ReloadRefusedError(fault + others)
        return program.revision

    def _running(self) -> Program:
        """Asked for each time: another process may have changed it. Raises ReloadRefusedError."""
        programs = [decode_program(data) for data in self._call(CORE_PROGRAM_METHOD)]
        if len(programs) < self._engines:
            raise ReloadRefusedError(
                f"policies change in all engines together, but this process speaks with "
                f"{len(programs)} of {self._engines}; restart them"
            )
        if len({(program.revision, program.generation) for program in programs}) > 1:
            raise ReloadRefusedError("the engines have different policies in force; restart the server")
        return programs[0]


def _first_fault(answers: list[str | None]) -> str | None:
    """With more than one engine, by whose it is."""
    for engine, fault in enumerate(answers):
        if fault:
            return fault if len(answers) == 1 else f"engine {engine}: {fault}"
    return None


_reloaders: list[Callable[[], Reloader | None]] = []


def reloader() -> Reloader | None:
    """This process's, once its engines are up; None where none was guarded, or it is another's task."""
    return _reloaders[-1]() if _reloaders else None


def reload_policies(llm: Any, path: Path | str) -> ReloadResult:
    """Put the policies at `path` in force in a vLLM `LLM` of this process, running requests included.

    Call it from the thread that uses the `LLM`, between two of its steps.

    Raises ReloadRefusedError for an `LLM` without the guard.
    """
    own = getattr(seam(llm, "llm_engine"), _RELOADER_ATTRIBUTE, None)
    if own is None:
        raise ReloadRefusedError(
            "this LLM is not guarded; make it with additional_config={'moe_guard': {'policies': PATH}}"
        )
    result: ReloadResult = own.apply(lambda: load_policies(path))
    return result


def reload_in_server(engine: Any, settings: Settings, bus: EventBus, vllm_config: Any) -> None:
    """For the event loop of an API server, once its engines answer."""
    client = seam(engine, "engine_core")
    loop, call_utility_all = asyncio.get_running_loop(), seam(client, "call_utility_all_async")

    def call(method: str, *args: Any) -> list[Any]:
        answer = asyncio.run_coroutine_threadsafe(call_utility_all(method, *args), loop)
        return _answers(lambda: answer.result(CALL_TIMEOUT_S))

    is_first = int(getattr(client, "client_index", 0)) == 0
    own = Reloader(call, bus, **_facts(settings, vllm_config), watches=is_first)
    _reloaders[:] = [lambda: own]


def reload_offline(engine: Any, settings: Settings, bus: EventBus, vllm_config: Any) -> None:
    """For an engine that the program itself drives, step by step."""
    client = seam(engine, "engine_core")
    core = getattr(client, "engine_core", None)

    def call(method: str, *args: Any) -> list[Any]:
        if hasattr(client, "call_utility"):  # in a process of its own
            return _answers(lambda: [seam(client, "call_utility")(method, *args)])
        return _answers(lambda: [getattr(core, method)(*args)])

    own = Reloader(call, bus, **_facts(settings, vllm_config))
    setattr(engine, _RELOADER_ATTRIBUTE, own)
    # An engine that nobody has any more must go before the next one starts.
    _reloaders[:] = [weakref.ref(own)]


def _facts(settings: Settings, vllm_config: Any) -> dict[str, Any]:
    return {
        "observe_only": settings.observe_only,
        "model": vllm_config.model_config.model,
        "engines": int(vllm_config.parallel_config.data_parallel_size),
    }


def _answers(ask: Callable[[], list[Any]]) -> list[Any]:
    try:
        return ask()
    except Exception as error:  # whatever vLLM raises when an engine is gone
        raise ReloadRefusedError(
            f"the engine did not answer ({type(error).__name__}: {error}); its log says why"
        ) from error
