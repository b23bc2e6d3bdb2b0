"""The guard in the engine core: blocks requests, keeps the ledger, sends what happened to the API."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import UtilityResult

from guard.errors import NotLiveError
from guard.events.ledger import Ending, Ledger
from guard.events.liveness import Liveness
from guard.events.message import (
    Delta,
    Health,
    Hello,
    Load,
    Message,
    News,
    RuleFacts,
    SetFacts,
    encode,
)
from guard.events.rulebook import RuleBook
from guard.failures import Failures, Stage
from guard.fault_injection import MESSAGE, strikes
from guard.policy.model import OnError
from guard.program.applicability import (
    RequestFacts,
    RulesByFacts,
    RulesFor,
    expired_exceptions,
    utc_today,
)
from guard.program.step_report import PackedReport, StepReport
from guard_vllm import kv_isolation
from guard_vllm.client import MESSAGE_CALL_ID, deliver
from guard_vllm.core_load import CoreLoad
from guard_vllm.core_reload import CoreReload
from guard_vllm.kv_blocks import KVBlocks, step_starts
from guard_vllm.parallel import reports_for_all
from guard_vllm.recording import RequestEnds
from guard_vllm.request_facts import rules_of_request, send_day
from guard_vllm.settings import Settings
from guard_vllm.steps import REPORT_ATTRIBUTE, Hook, wrap
from guard_vllm.worker import STATUS_METHOD, WorkerStatus

logger = logging.getLogger(__name__)

_UNJUDGED = "moe_guard"
"""The reason that clients get where no rule can be named."""

_INTERNAL_ID = re.compile(r"^(?:\d+_)?(?P<external>.+)-[0-9a-f]{8}$")


def external_request_id(internal_id: str) -> str:
    """The id that the client knows: vLLM adds a random suffix, and a number before each of n > 1."""
    match = _INTERNAL_ID.match(internal_id)
    return match["external"] if match else internal_id


class EngineCoreGuard:
    """Hangs on one engine core and its scheduler; made when all workers are up and have proved
    themselves, which is before the scheduler exists.

    Raises NotLiveError where the workers do not agree on the program.
    """

    def __init__(self, core: Any, settings: Settings) -> None:
        self._core = core
        self._engine = int(getattr(core, "engine_index", 0))
        self._reports = reports_for_all(core.vllm_config.parallel_config)
        self._failures = Failures()
        self._serials: Counter[int] = Counter()  # of the last message to each API server
        self._blocked: Mapping[str, Ending] = {}
        self._cut_tokens: Hook | None = None
        statuses = core.model_executor.collective_rpc(STATUS_METHOD)
        status = _agreed(statuses)
        self._hooked = False
        self._kept_group = status.kept_group
        self._kv_blocks: KVBlocks | None = None
        self._records = settings.record is not None
        self._ends: RequestEnds | None = None
        self._can_confirm = False
        self._unruled_steps = 0  # handed to the workers before there were rules
        self._is_quiet = False  # nothing has happened in the step at hand that cannot wait
        self._deliver_at_s = 0.0
        self._isolation = kv_isolation.Isolation(status) if status.masking else None
        self._remember(status)
        hello = _hello(self._engine, statuses)
        self._liveness = Liveness(self._engine, live=hello.live, blind_layers=hello.blind_layers)
        self._ledger = Ledger(
            self._engine,
            _book(status),
            redacted=settings.redact_reasons,
            external_id=external_request_id,
            rules_of=self._rules_of,
            liveness=self._liveness,
        )
        wrap(core, "add_request", self._add_request)
        wrap(core, "post_step", self._post_step)
        CoreReload(core, self._follow, self._computed, self._failures)
        self._load = CoreLoad(core, self._engine, status, self._show_load if self._reports else None)
        if self._isolation is not None:
            self._isolation.install()
        self._broadcast(hello)

    def _remember(self, status: WorkerStatus) -> None:
        self._revision = status.revision
        self._rules = status.rules
        self._rules_by_facts = RulesByFacts(status.rules)
        self._closed_R = np.array([r.on_error is OnError.CLOSED for r in status.rules], dtype=np.bool_)
        for warning in expired_exceptions(status.rules, utc_today()):
            logger.warning("MoE Guard: %s", warning)

    def _follow(self, statuses: list[WorkerStatus]) -> None:
        """The workers have put another program in force, between two steps. From here on in the engine
        core, too; steps that were handed out before are still read by the rules that decided them."""
        self._is_quiet = False
        status, scheduler = statuses[0], getattr(self._core, "scheduler", None)
        if self._isolation is not None and scheduler is not None:
            self._isolation.follow(status, scheduler)
        if status.rules and not self._rules:
            self._unruled_steps = len(getattr(self._core, "batch_queue", None) or ())
        self._remember(status)
        self._load.follow(status)
        self._ledger.follow(_book(status))
        if scheduler is not None:
            self._trust_no_earlier_prefix(scheduler)
        health = self._liveness.health
        hello = _hello(self._engine, statuses)
        self._broadcast(
            msgspec.structs.replace(hello, live=health.up, blind_layers=health.blind_layers)
        )

    def _trust_no_earlier_prefix(self, scheduler: Any) -> None:
        """What was seen before may not have been by rules that are new: who must not go unjudged takes
        no block from the cache that was computed before."""
        if self._kv_blocks is not None:
            known = {r.request_id: r.num_computed_tokens for r in scheduler.requests.values()}
            self._kv_blocks.must_be_seen(self._must_be_seen(), known)
        if not self._can_confirm:
            for request in scheduler.requests.values():
                if self._is_closed_for(request):
                    request.skip_reading_prefix_cache = True

    def _must_be_seen(self) -> Callable[[Any], bool] | None:
        return self._is_closed_for if self._can_confirm and self._closed_R.any() else None

    def _computed(self) -> dict[str, int]:
        """Positions of each request that the steps handed out have computed, where no rules were that
        would have counted them. Rather too few: a token left out would not show."""
        scheduler = getattr(self._core, "scheduler", None)
        if self._rules or scheduler is None:
            return {}
        speculates = self._core.vllm_config.speculative_config is not None
        computed = {}
        for request in scheduler.requests.values():
            known = request.num_computed_tokens
            if speculates:
                known -= request.num_in_flight_tokens  # drafts among them may be rejected
            if request.num_output_tokens:
                known = max(known, request.num_tokens - 1)  # preempted perhaps, but was there
            computed[request.request_id] = max(known, 0)
        return computed

    def _add_request(self, stock: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._hooked:
            # Before anything is scheduled; when the guard was made, there was no scheduler yet.
            self._hooked = True
            scheduler = self._core.scheduler
            wrap(scheduler, "update_from_output", self._update_from_output)
            self._cut_tokens = Hook(
                scheduler, "_update_request_with_output", self._update_request_with_output
            )
            wrap(scheduler, "_free_request", self._free_request)
            self._hook_kv_blocks(scheduler)
            if self._records:
                self._ends = RequestEnds(scheduler)
        send_day(request)
        if self._isolation is not None:
            self._isolation.admit(request)
        if not self._can_confirm and self._is_closed_for(request):
            # Whether a cached prefix was seen is not known, and this request must not go unjudged.
            request.skip_reading_prefix_cache = True
        return stock(request, *args, **kwargs)

    def _hook_kv_blocks(self, scheduler: Any) -> None:
        if self._kept_group is None:
            return
        # What a connector brings was seen by nobody here.
        self._can_confirm = scheduler.connector is None
        self._kv_blocks = KVBlocks(scheduler, self._kept_group, self._failures, self._must_be_seen())

    def _rules_of(self, req_id: str) -> RulesFor:
        request = self._core.scheduler.requests.get(req_id)
        if request is None:  # it has ended since
            return self._rules_by_facts.of(RequestFacts(req_id))
        return rules_of_request(request, self._revision, self._rules_by_facts)

    def _is_closed_for(self, request: Any) -> bool:
        """Whether a rule that fails closed acts on this request."""
        if not self._closed_R.any():
            return False
        enforced_R = rules_of_request(request, self._revision, self._rules_by_facts).enforced_R
        return bool((enforced_R & self._closed_R).any())

    def _update_from_output(self, stock: Any, scheduler_output: Any, output: Any) -> Any:
        began = time.perf_counter()
        ledger, kv_blocks = self._ledger, self._kv_blocks
        report: StepReport | PackedReport | None = getattr(output, REPORT_ATTRIBUTE, None)
        if kv_blocks is not None and kv_blocks.notes_steps:
            kv_blocks.note_step(scheduler_output, report)
        self._blocked = {}
        is_quiet: bool | None = False
        if isinstance(report, PackedReport):
            is_quiet = self._failures.tried(Stage.LEDGER, self._takes_quietly, report)
        if is_quiet:
            self._is_quiet = True
            spent = time.perf_counter() - began
            outputs = stock(scheduler_output, output)
            ledger.end_step(spent)
            return outputs
        self._is_quiet = False
        if scheduler_output.num_scheduled_tokens and (report is not None or self._awaits_report()):
            self._enter_step(scheduler_output, report, has_failed=is_quiet is None)
        assert self._cut_tokens is not None, "requests come first"
        spent = time.perf_counter() - began
        if self._blocked or ledger.awaits_tokens:
            # Called for each request, so only in steps in which there is something to do.
            with self._cut_tokens.hung():
                outputs = stock(scheduler_output, output)
        else:
            outputs = stock(scheduler_output, output)
        began = time.perf_counter()
        ledger.end_step()
        ledger.note_own_time(spent + time.perf_counter() - began)
        return outputs

    def _takes_quietly(self, report: PackedReport) -> bool:
        """Whether nothing is to be done in a step but to add up its sums, and that later."""
        requests, last = self._core.scheduler.requests, RequestStatus.PREEMPTED
        for req_id in report.req_ids:  # as in `_rows_of`
            request = requests.get(req_id)
            if request is None or request.status > last:
                return False
        return self._ledger.take_quiet_step(report)

    def _enter_step(
        self,
        scheduler_output: Any,
        report: StepReport | PackedReport | None,
        *,
        has_failed: bool,
    ) -> None:
        """has_failed: when it was tried to be taken quietly"""
        if not has_failed:
            with self._failures.caught(Stage.LEDGER) as attempt:
                if report is None:
                    report = self._unreported(tuple(scheduler_output.num_scheduled_tokens))
                self._ledger.note_step(report)
                self._blocked = self._ledger.begin_step(report, self._rows_of)
                # Before this step's tokens fill a block.
                self._isolate_kv(report, scheduler_output)
            has_failed = attempt.failed
        if has_failed:
            is_counted = report is None or self._ledger.has_begun(report)
            faults = {} if report is None or is_counted else report.failures
            req_ids = tuple(scheduler_output.num_scheduled_tokens)
            self._enter_failed_step(req_ids, scheduler_output, faults)

    def _awaits_report(self) -> bool:
        """Whether the step at hand was handed out under a program with rules, whatever is in force
        now."""
        if self._unruled_steps:
            self._unruled_steps -= 1
            return False
        return bool(self._rules)

    def _enter_failed_step(
        self, req_ids: tuple[str, ...], scheduler_output: Any, faults: Mapping[str, int]
    ) -> None:
        """faults: of the worker, that are not counted yet"""
        failed = StepReport.of_failed_step(self._revision, req_ids, faults)
        with self._failures.caught(Stage.LEDGER) as attempt:
            unjudged = self._ledger.begin_step(failed, self._rows_of)
            self._blocked = {**unjudged, **self._blocked}
        if attempt.failed:
            self._liveness.note_fault()
            with self._failures.caught(Stage.LEDGER) as attempt:
                self._blocked = self._ledger.give_up(self._rows_of(req_ids))
            if attempt.failed:
                self._blocked = self._closed_ones(req_ids)
        with self._failures.caught(Stage.LEDGER):
            self._isolate_kv(failed, scheduler_output)

    def _closed_ones(self, req_ids: tuple[str, ...]) -> dict[str, Ending]:
        """Who must not go unjudged ends, though the ledger can say nothing about it."""
        requests = self._core.scheduler.requests
        return {
            req_id: Ending(_UNJUDGED)
            for req_id in self._rows_of(req_ids)
            if self._is_closed_for(requests[req_id])
        }

    def _unreported(self, req_ids: tuple[str, ...]) -> StepReport:
        """A step of which the worker said nothing was not judged."""
        return StepReport.of_failed_step(self._revision, req_ids, {Stage.READBACK: 1})

    def _rows_of(self, req_ids: Sequence[str]) -> dict[str, int]:
        """The places of the requests for which the scheduler takes this step's result, as it will
        decide itself: those that it knows and that have not finished."""
        requests, last = self._core.scheduler.requests, RequestStatus.PREEMPTED
        return {
            req_id: row
            for row, req_id in enumerate(req_ids)
            if (request := requests.get(req_id)) is not None and request.status <= last
        }

    def _update_request_with_output(
        self, stock: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> Any:
        ending = self._blocked.get(request.request_id)
        if ending is not None:
            # Tokens are dropped before anything sees them: grammar, logprobs, usage. Those that
            # accepted drafts gave ahead of the block are the client's.
            position = -1 if ending.position is None else ending.position
            del new_token_ids[max(position + 1 - request.num_tokens, 0) :]
        stopped = False
        if new_token_ids:
            new_token_ids, stopped = stock(request, new_token_ids, *args, **kwargs)
        if ending is None or stopped:
            # The last token was not fed back, so nothing was decided at it.
            self._accept(request, request.num_tokens - 2)
            return new_token_ids, stopped
        if ending.position is not None:
            self._accept(request, ending.position)
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = ending.reason
        request.resumable = False
        return new_token_ids, True

    def _accept(self, request: Any, last_position: int) -> None:
        with self._failures.caught(Stage.LEDGER):
            self._ledger.accept(request.request_id, last_position)

    def _free_request(self, stock: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._is_quiet = False
        if self._ends is not None:
            with self._failures.caught(Stage.RECORD):
                ending = self._blocked.get(request.request_id)
                blocked = ending is not None and request.stop_reason == ending.reason
                self._ends.note(request, blocked=blocked)
        with self._failures.caught(Stage.LEDGER):
            self._ledger.finish(request.request_id)
            if self._kv_blocks is not None:
                self._kv_blocks.finish(request.request_id)
        return stock(request, *args, **kwargs)

    def _isolate_kv(self, report: StepReport | PackedReport, scheduler_output: Any) -> None:
        if self._isolation is None:
            return
        scheduler = self._core.scheduler
        for req_id, start in self._ledger.mask_starts().items():
            request = scheduler.requests.get(req_id)
            if request is not None:
                self._isolation.isolate_from(request, start)
        if self._ledger.has_seen_all:
            return
        if isinstance(report, PackedReport):
            report = report.unpacked()
        unjudged = report.unjudged()
        if not unjudged:
            return
        starts = step_starts(scheduler_output)
        for req_id in unjudged & starts.keys() & scheduler.requests.keys():
            request = scheduler.requests[req_id]
            if self._isolation.shares_masked:
                # Whether these rows were masked as they should have been is not known.
                self._isolation.distrust(scheduler, request, starts[req_id])
            self._isolation.suspect(request, starts[req_id])

    def _post_step(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        if self._is_quiet and time.monotonic() < self._deliver_at_s:
            self._is_quiet = False
            return result
        self._deliver()
        return result

    def _deliver(self) -> None:
        began = time.perf_counter()
        with self._failures.caught(Stage.DELIVER):
            if faults := self._failures.take():
                self._ledger.note_failures(faults)
            idle = not self._core.scheduler.has_unfinished_requests()
            if idle:
                self._ledger.forget_requests()
            while (delta := self._ledger.take(idle=idle)) is not None:
                with self._failures.caught(Stage.DELIVER) as attempt:
                    if self._reports:
                        self._send(delta, client_index=0)
                if attempt.failed:
                    self._ledger.put_back(delta)
                    break
                with self._failures.caught(Stage.DELIVER):
                    self._tell_others(delta)
            health = self._liveness.take()
            if health is not None:
                with self._failures.caught(Stage.DELIVER) as attempt:
                    self._broadcast(health)
                if attempt.failed:
                    self._liveness.put_back()
            self._ledger.note_own_time(time.perf_counter() - began)
        with self._failures.caught(Stage.METRICS):
            self._load.ask_if_due()
        self._deliver_at_s = self._ledger.due_at

    def _tell_others(self, delta: Delta) -> None:
        """The first API server counts and writes down; clients may listen at any."""
        if self._reports and delta.decisions:
            news = News(delta.engine, delta.decisions)
            for client_index in range(1, self._num_clients):
                self._send(news, client_index)

    def _show_load(self, load: Load) -> None:
        self._send(load, client_index=0)

    def _broadcast(self, message: Hello | Health) -> None:
        for client_index in range(self._num_clients):
            self._send(message, client_index)

    @property
    def _num_clients(self) -> int:
        """API servers that this engine core answers."""
        addresses = getattr(self._core, "addresses", None)
        return 1 if addresses is None else len(addresses.outputs)

    def _send(self, message: Message, client_index: int) -> None:
        """Raises where it does not get out."""
        serial = self._serials[client_index] + 1
        if not strikes(MESSAGE):
            self._put(encode(message, serial), client_index)
        self._serials[client_index] = serial

    def _put(self, data: bytes, client_index: int) -> None:
        output_queue = getattr(self._core, "output_queue", None)
        if output_queue is None:
            deliver(data)  # an engine core in the caller's own process
            return
        outputs = EngineCoreOutputs(
            engine_index=self._engine,
            utility_output=UtilityOutput(call_id=MESSAGE_CALL_ID, result=UtilityResult(data)),
        )
        output_queue.put_nowait((client_index, outputs))


def _agreed(statuses: list[WorkerStatus]) -> WorkerStatus:
    first = statuses[0]
    for rank, status in enumerate(statuses):
        if status.layers != first.layers:
            raise NotLiveError(
                f"worker {rank} has the MoE layers {status.layers}, but worker 0 has {first.layers}"
            )
        if (status.revision, status.rules) != (first.revision, first.rules):
            raise NotLiveError(
                f"worker {rank} has policy revision {status.revision}, but worker 0 has "
                f"{first.revision}; give every worker the same policy files, then start again"
            )
    return first


def _book(status: WorkerStatus) -> RuleBook:
    rules = tuple(RuleFacts.of(rule) for rule in status.rules)
    return RuleBook(status.revision, rules, status.mask_rules, len(status.sets))


def _hello(engine: int, statuses: list[WorkerStatus]) -> Hello:
    status = statuses[0]
    return Hello(
        engine=engine,
        revision=status.revision,
        policies=status.policies,
        rules=tuple(RuleFacts.of(rule) for rule in status.rules),
        sets=tuple(SetFacts(named.policy, named.name) for named in status.sets),
        masked_experts=status.masked_experts,
        blind_layers=len({number for status in statuses for number in status.proof.blind_layers}),
        live=all(status.proof.holds for status in statuses),
    )
