"""The guard of one model replica on one device: the object that an integration holds in each worker."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from guard import fault_injection
from guard.device.agreement import RankAgreement
from guard.device.carry_over import CarryOver
from guard.device.check import CHECK_EVERY_STEPS, LivenessCheck
from guard.device.evaluate import KeepsSignals
from guard.device.findings import CheckFindings
from guard.device.inference import in_inference_mode
from guard.device.kept_evidence import KeepRows, KeptEvidence
from guard.device.kernels.backends import Judge
from guard.device.kernels.native.whole_step import WholeStep, make_whole_step
from guard.device.layout import LOAD_EVERY_STEPS, NULL_SLOT, Capacity
from guard.device.load import ExpertLoad
from guard.device.mask import ExpertMask
from guard.device.packed import PinnedPool
from guard.device.readback import (
    Readback,
    ReplayedDecisions,
    StepDecisions,
    StepFacts,
)
from guard.device.replay import CachedPrefix, replay_chunks
from guard.device.rows import StepBatch, last_rows
from guard.device.start import make_start
from guard.device.state import Admission, SlotState, host_to_device
from guard.device.tap import RoutingTap
from guard.errors import ReloadRefusedError
from guard.failures import Failures, Stage
from guard.fault_injection import strikes
from guard.prepared import PreparedProgram, check_fits, check_follows, make_evaluator
from guard.program.applicability import RequestFacts, RulesByFacts, RulesFor
from guard.program.program import Program
from guard.program.step_report import PackedReport, StepReport


class LiveRequest(NamedTuple):
    """What is remembered of a request that has not ended, for programs that come while it runs.

    facts: what decides which rules apply to it
    """

    prompt_tokens: int
    facts: RequestFacts


class Guard:
    """Watches the routing of each step and decides about each request.

    The integration calls, in this order: `add_request` and `finish_requests` as requests come and
    go, `begin_step` before a forward, the `tap` and the `mask` inside it, `end_step` behind it;
    `idle` before a forward of dummy rows. Nothing here waits for the device.

    blind: set it where not every layer reports: then nothing is judged, and every step says so
    is_split: other ranks run another program, so that nothing ends the blindness but a restart
    tap: routing of the step, written by the model's routers
    agreement: of several ranks that compute the same rows (`agree_with`); None where one rank does
    load: how often each expert was chosen, in a step of `load_every`; 0: in none
    is_idle: nothing is left of a step, so that `idle` has nothing to do
    mask: what the routers must exclude; None where the server was started to observe only, and then
        the rules that mask are in audit for every request
    """

    _has_all_layers = True

    def __init__(
        self,
        program: Program,
        capacity: Capacity,
        device: torch.device,
        *,
        masking: bool = True,
        load_every: int = LOAD_EVERY_STEPS,
    ) -> None:
        self.program = program
        self._rules_by_facts = RulesByFacts(program.rules)
        self.capacity = capacity
        self.device = device
        self.failures = Failures()
        self.blind = False
        self.is_idle = False
        self.is_split = False
        self.agreement: RankAgreement | None = None
        self.tap = RoutingTap(program.topology, capacity, device)
        self.mask = ExpertMask(program.topology, capacity, device) if masking else None
        self._check = LivenessCheck(program.topology, program.masks, device)
        self.load = ExpertLoad(program.topology, device, load_every)
        self._layers = tuple(layer.number for layer in program.topology.layers)
        self._state = SlotState(program, capacity, device)
        self._start = make_start(self.tap, self.mask, self._state)
        self._set_evaluator(make_evaluator(program, capacity, device))
        self._requests: dict[str, LiveRequest] = {}
        self._slot_of: dict[str, int] = {}
        self._known_slots: tuple[tuple[str, ...], torch.Tensor] | None = None
        self._free_slots = list(range(capacity.max_slots, NULL_SLOT, -1))
        self._num_steps = 0
        self._missed: set[str] = set()  # requests of failed steps, until their next good one
        self._batch: StepBatch | None = None
        self._whole: WholeStep | None = None
        self._is_whole = False  # the step at hand was begun by it
        self._in_force_TA: torch.Tensor | None = None
        self._findings: CheckFindings | None = None
        self._req_ids: tuple[str, ...] = ()
        self.kept: KeptEvidence | None = None
        self._cached: dict[str, tuple[Sequence[int], int]] = {}  # prefixes that await their step
        self._kv_slot_T: torch.Tensor | None = None
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = PinnedPool()
        if self.mask is not None:
            self.mask.install(program.masks, program.generation)
        self._set_whole_step()

    def _set_evaluator(self, evaluator: Judge | None) -> None:
        self._evaluator = evaluator
        found: object = evaluator
        self._keeper = found if isinstance(found, KeepsSignals) else None

    def _set_whole_step(self) -> None:
        """Whenever something else is in force than what it was made of."""
        alone = self._has_all_layers and self.agreement is None and self.device.type == "cpu"
        self._whole = (
            make_whole_step(
                self._evaluator,
                self.tap,
                self.mask,
                self._state,
                self.kept,
                self._check,
                self.load,
            )
            if alone
            else None
        )

    @property
    def layers(self) -> Sequence[int]:
        """Rows of the topology whose routers are on this rank."""
        return range(len(self.program.topology.layers))

    def agree_with(self, group: dist.ProcessGroup) -> None:
        """The ranks of this group compute the same rows. Each of them must call it."""
        self.agreement = RankAgreement(group, self.capacity.max_slots, self._check.form, self.device)
        self.agreement.follow(self.program.revision, self.program.generation, self._check.form)
        self._set_whole_step()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def judges(self) -> bool:
        """There are rules. Where there are none, requests are only remembered."""
        return self._evaluator is not None

    def add_request(self, req_id: str, prompt_tokens: int, facts: RequestFacts | None = None) -> None:
        """Follow a request from its first step on. One that is followed already goes on as it is:
        a preempted request keeps its windows, its masks and its count of positions.

        facts: what decides which rules apply to it; None: nothing is known but its id
        """
        if req_id in self._requests:
            return
        with self.failures.caught(Stage.ADMIT):
            self._requests[req_id] = LiveRequest(prompt_tokens, facts or RequestFacts(req_id))
            if self.judges:
                self._admit(req_id)

    def _admit(self, req_id: str, next_position: int = 0) -> None:
        with self.failures.caught(Stage.ADMIT) as attempt:
            request = self._requests[req_id]
            rules = self._rules_for(self.program, self._rules_by_facts, request.facts)
            slot = self._take_slot(req_id)
            self._state.add_request(Admission(slot, request.prompt_tokens, rules, next_position))
        if attempt.failed:
            self.finish_requests([req_id])  # its slot still says what the request before it left

    def _rules_for(
        self, program: Program, rules_by_facts: RulesByFacts, facts: RequestFacts
    ) -> RulesFor:
        rules = rules_by_facts.of(facts)
        if self.mask is not None:
            return rules
        return replace(rules, enforced_R=rules.enforced_R & ~program.is_mask_rule)

    def _take_slot(self, req_id: str) -> int:
        if not self._free_slots:
            self._free_slots.extend(reversed(self._state.grow()))
        slot = self._free_slots.pop()
        self._slot_of[req_id] = slot
        self._known_slots = None
        return slot

    def finish_requests(self, req_ids: Iterable[str]) -> None:
        """Free the slots of requests that ended, not of those that are merely preempted."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)
            self._missed.discard(req_id)
            self._cached.pop(req_id, None)
            self._free_slot(req_id)

    def _free_slot(self, req_id: str) -> None:
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self._free_slots.append(slot)
            self._known_slots = None

    def prepare(self, program: Program) -> PreparedProgram:
        """All parts of `prepare_in_parts` at once."""
        *_, prepared = self.prepare_in_parts(program)
        assert prepared is not None
        return prepared

    def prepare_in_parts(self, program: Program) -> Iterator[PreparedProgram | None]:
        """What `install` needs, on the device, while the program before goes on. It is the long part of
        a reload: it gives None behind each part of its own, so that steps can come in between.

        Raises ReloadRefusedError for a program that does not fit what was provisioned at start.
        """
        check_fits(program, self.program, self.capacity, masking=self.mask is not None)
        evaluator = make_evaluator(program, self.capacity, self.device)
        yield None
        rules_by_facts = RulesByFacts(program.rules)
        state = SlotState(program, self.capacity, self.device)
        carry_over = CarryOver(self.program, program, self.device)
        yield None
        check = LivenessCheck(program.topology, program.masks, self.device)
        yield None
        mask = None
        if self.mask is not None:
            mask = self.mask.prepare(program.masks)
            self.mask.announce(mask, program.generation)
        kept = None if self.kept is None else self.kept.prepare(program.signals, program.generation)
        yield PreparedProgram(program, rules_by_facts, evaluator, state, carry_over, check, mask, kept)

    @in_inference_mode
    def install(self, prepared: PreparedProgram, computed: Mapping[str, int] | None = None) -> None:
        """Put a prepared program in force, between two steps, requests under way included.

        computed: of requests under way, how many positions are computed; needed where nothing was
            judged until now. What is not in it is followed from position 0 on.

        Rules that go on keep what they counted and what they mask. What a removed rule masked is masked
        no longer, not even in a recompute of positions that were: the rule is not known any more.

        Raises ReloadRefusedError, and then the program before is still in force.
        """
        if self._batch is not None or self._is_whole:
            raise ReloadRefusedError("a step is under way; a program takes effect between two of them")
        check_follows(prepared.program, self.program)
        judged = self.judges
        while prepared.state.num_slots < self._state.num_slots:
            prepared.state.grow()  # slots keep their numbers, free ones too
        if judged and prepared.evaluator is not None:
            self._carry_over(prepared)
        self.program, self._rules_by_facts = prepared.program, prepared.rules_by_facts
        self._set_evaluator(prepared.evaluator)
        prepared.check.take_over(self._check)
        self._state, self._check = prepared.state, prepared.check
        if self.mask is not None and prepared.mask is not None:
            self.mask.put(prepared.mask, self.program.generation)
        if self.kept is not None and prepared.kept is not None:
            self.kept.install(prepared.kept)
        if self.agreement is not None:
            self.agreement.follow(self.program.revision, self.program.generation, self._check.form)
        self._set_whole_step()
        if not self.judges:
            self._cached.clear()
            self._missed.clear()
            for req_id in tuple(self._slot_of):
                self._free_slot(req_id)
        elif not judged:
            for req_id in tuple(self._requests):
                self._admit(req_id, (computed or {}).get(req_id, 0))

    def _carry_over(self, prepared: PreparedProgram) -> None:
        before, after = self._state, prepared.state
        if not self._slot_of:
            return
        before.apply_staged_writes()
        rules = [
            self._rules_for(prepared.program, prepared.rules_by_facts, self._requests[req_id].facts)
            for req_id in self._slot_of
        ]
        prepared.carry_over.apply(
            before,
            after,
            host_to_device(np.fromiter(self._slot_of.values(), np.int64, len(rules)), self.device),
            host_to_device(np.stack([each.applies_R for each in rules]), self.device),
            host_to_device(np.stack([each.enforced_R for each in rules]), self.device),
            host_to_device(np.stack([each.exempt_R for each in rules]), self.device),
        )

    def keep_evidence(self, num_blocks: int, block_size: int) -> KeptEvidence:
        """From now on keep what is seen of each token beside its KV, so that a prefix taken from the
        cache counts as if it had been computed."""
        program = self.program
        self.kept = KeptEvidence(
            program.signals,
            program.topology,
            num_blocks,
            block_size,
            self.device,
            program.generation,
        )
        self._set_whole_step()
        return self.kept

    def take_from_cache(self, req_id: str, blocks: Sequence[int], num_tokens: int) -> None:
        """The first `num_tokens` positions of a request of the next step come from the cache: the step
        does not compute them. Their KV lies in `blocks`, in order."""
        if self.kept is not None and self.judges and num_tokens > 0:
            self._cached[req_id] = (blocks, num_tokens)

    def begin_step(
        self,
        req_ids: Sequence[str],
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int | None = None,
    ) -> None:
        """Say which rows the forward that follows computes, and put their masks in force.

        req_ids: requests in row order
        query_start_B1: [B+1 or more] on the device; first row of each request, and the number of rows
        position_T: [T or more] on the device; position of each row in its request
        num_rows: T; None: as many as `position_T` has
        """
        self.count_step()
        rows = (req_ids, query_start_B1, position_T, num_rows)
        if not self.failures.tried(Stage.BEGIN_STEP, self.begin_step_uncaught, *rows):
            self.give_up_step(req_ids)

    def count_step(self) -> None:
        """A step comes, whatever becomes of it: all ranks check and sample the same ones."""
        if self._evaluator is not None:
            number, load = self._num_steps, self.load
            self._check.is_due = number % CHECK_EVERY_STEPS == 0
            load.is_due = load.every > 0 and number % load.every == 0
            self._num_steps = number + 1

    def give_up_step(self, req_ids: Iterable[str]) -> None:
        """A step of these requests could not be begun: it judges and masks nobody, and its report says
        so."""
        self.idle()
        self._req_ids = tuple(req_ids) if self.judges else ()

    def begin_step_uncaught(
        self,
        req_ids: Sequence[str],
        query_start_B1: torch.Tensor,
        position_T: torch.Tensor,
        num_rows: int | None = None,
        kv_slot_T: torch.Tensor | None = None,
    ) -> bool:
        """`begin_step` and `place_rows`, for a caller who has counted the step, catches what goes
        wrong, and gives it up then. Returns that it was begun."""
        self._batch = self._in_force_TA = self._findings = None
        self._kv_slot_T, self._is_whole, self.is_idle = kv_slot_T, False, False
        if self._evaluator is None:
            return True
        num_rows = len(position_T) if num_rows is None else num_rows
        self._req_ids = ids = tuple(req_ids)
        whole = self._whole
        if (
            whole is not None
            and ids
            and not (self._cached or self._missed or self.blind or self.failures.has_new)
            and not self._state.staged_writes
            and (self.kept is None or not self.kept.staged_writes)
            and not (self._check.is_due and not (whole.checks and fault_injection.drill is None))
        ):  # an ordinary step: there is no operation of torch in it, see `WholeStep`
            known = self._known_slots
            slots_B = known[1] if known is not None and known[0] == ids else self._slots(ids)
            whole.begin(slots_B, query_start_B1, position_T, num_rows)
            self._is_whole = True
        else:
            self._begin_in_parts(query_start_B1[: len(ids) + 1], position_T[:num_rows])
        return True

    @property
    def batch(self) -> StepBatch | None:
        """The rows of the step that was begun; None behind it, and where it could not begin."""
        return self._whole.batch() if self._is_whole and self._whole is not None else self._batch

    @in_inference_mode
    def _begin_in_parts(self, query_start_B1: torch.Tensor, position_T: torch.Tensor) -> None:
        self._catch_up(self._req_ids)
        self._state.apply_staged_writes()
        slots_B = self._slots(self._req_ids)
        batch, self._in_force_TA = self._start.begin(slots_B, query_start_B1, position_T, self._state)
        if self._in_force_TA is None and self._check.is_due:
            self._in_force_TA = self._masks_of(batch)
        if self.kept is not None:
            self.kept.apply_staged_writes()
        self._batch = batch

    def _masks_of(self, batch: StepBatch) -> torch.Tensor | None:
        """bool [T, A], the mask actions in force. None where there are none at all."""
        if self.mask is None or not self.program.masks.num_actions:
            return None
        return self._state.masks_at(batch.slot_T, batch.position_T)

    def _slots(self, req_ids: tuple[str, ...]) -> torch.Tensor:
        """int64 [B]. A step's requests are as a rule those of the step before."""
        if self._known_slots is None or self._known_slots[0] != req_ids:
            slot_of = self._slot_of
            slots_np = np.array([slot_of.get(req_id, NULL_SLOT) for req_id in req_ids], dtype=np.int64)
            self._known_slots = (req_ids, host_to_device(slots_np, self.device))
        return self._known_slots[1]

    def place_rows(self, kv_slot_T: torch.Tensor) -> None:
        """Where the step that was begun writes its rows' KV: [rows or more] on the device."""
        self._kv_slot_T = kv_slot_T

    def end_step(
        self, rejected_B: torch.Tensor | None = None
    ) -> Readback | PackedReport | StepReport | None:
        """Decide, and start the copy of what was decided. None if there is nothing to decide.

        rejected_B: [B] on the device; draft rows at the end of each request that were not accepted
        """
        if self._evaluator is None:
            return None
        if not self._is_whole or not self._stays_whole(rejected_B):
            return self._end_in_parts(rejected_B)
        whole, ids, mask = self._whole, self._req_ids, self.mask
        assert whole is not None, "it has begun the step"
        kv_slot_T = None if self.kept is None else self._kv_slot_T
        decided = self.failures.tried(Stage.EVALUATE, whole.end, ids, self.program.revision, kv_slot_T)
        self._req_ids, self._is_whole = (), False
        self.is_idle = mask is None or not mask.rows_in_use
        if isinstance(decided, PackedReport):
            return decided
        return self._report_of(ids, decided)

    def _stays_whole(self, rejected_B: torch.Tensor | None) -> bool:
        """Whether the step that was begun in one call can end in one; otherwise it goes on in parts."""
        assert self._whole is not None, "it has begun the step"
        is_placed = self.kept is None or self._kv_slot_T is not None
        stays = rejected_B is None and is_placed
        if stays and self._check.is_due:
            stays = self.failures.tried(Stage.EVALUATE, self._whole.is_sound) is True
        if stays:
            return True
        self._batch, self._is_whole = self.batch, False
        if self._check.is_due and self._batch is not None:
            self._in_force_TA = self.failures.tried(Stage.EVALUATE, self._masks_of, self._batch)
        return False

    def _report_of(
        self, req_ids: Sequence[str], decisions: StepDecisions | None
    ) -> Readback | StepReport:
        """Of a whole step in which something fired, or went wrong: then there are no decisions."""
        readback = None
        if decisions is not None:
            with self.failures.caught(Stage.EVALUATE):
                if self._check.is_due:
                    self._findings = self._check.nothing_found(len(req_ids))
                readback = self._readback(req_ids, decisions, [])
        if readback is None:
            with torch.inference_mode(), self.failures.caught(Stage.EVALUATE):
                self._state.distrust(self._slots(tuple(req_ids)))
        return self._failed_step(req_ids) if readback is None else readback

    @in_inference_mode
    def _end_in_parts(self, rejected_B: torch.Tensor | None) -> Readback | StepReport | None:
        batch, req_ids = self._batch, self._req_ids
        self._batch, self._req_ids = None, ()
        prefixes = self._cached_prefixes(req_ids) if self._cached else []
        if not req_ids or batch is None or self.blind:
            self._report_fault()
            return self._failed_step(req_ids) if req_ids else None
        readback, evaluated = None, False
        with self.failures.caught(Stage.EVALUATE) as attempt:
            signal_TX = self._kept_signals(batch, rejected_B)
            # Behind it: a prefix may lie in blocks that this very step computes.
            replayed = self._replay(prefixes, batch, rejected_B)
            decisions = self._judge(req_ids, batch, signal_TX, rejected_B)
            evaluated = True
            if self.agreement is not None:
                decisions, self._findings = self.agreement.agree(decisions, self._findings)
                if self._findings is not None:
                    self._check.hear(self._findings)
            readback = self._readback(req_ids, decisions, replayed)
        if attempt.failed:
            if not evaluated:
                self._report_fault()
            with self.failures.caught(Stage.EVALUATE):
                self._state.distrust(batch.slots_B)
        return self._failed_step(req_ids) if readback is None else readback

    def _readback(
        self,
        req_ids: Sequence[str],
        decisions: StepDecisions,
        replayed: Sequence[ReplayedDecisions],
    ) -> Readback:
        return Readback(
            self.program.revision,
            req_ids,
            StepFacts(decisions, self._findings),
            self._copy_stream,
            self.failures.take(),
            replayed,
            self._layers,
            self._pool,
        )

    def _catch_up(self, req_ids: Collection[str]) -> None:
        """Decide what a step with these requests depends on, and this rank does not know yet."""

    def _kept_signals(self, batch: StepBatch, rejected_B: torch.Tensor | None) -> torch.Tensor:
        """int64 [T, X]: the step's signals, which are kept beside the KV from now on."""
        num_rows, keep = len(batch.position_T), None
        kv_slot_T = self._place_of_rows()
        if self.kept is not None and kv_slot_T is not None:
            keep = KeepRows(self.kept, kv_slot_T[:num_rows], batch, rejected_B)
        if self._has_all_layers and self._keeper is not None:
            trusted_T1 = self._check_routing(batch)
            self._count_load(batch, rejected_B, trusted_T1)
            return self._keeper.kept_signals(self.tap, num_rows, trusted_T1, keep)
        signal_TX = self._signals(batch, rejected_B)
        if keep is not None:
            keep.write(signal_TX)
        return signal_TX

    def _place_of_rows(self) -> torch.Tensor | None:
        """What `place_rows` said. None where nothing is kept."""
        if self.kept is None:
            return None
        if self._kv_slot_T is None:
            raise RuntimeError("where the step's KV is written was not said: `place_rows` is missing")
        return self._kv_slot_T

    def _signals(self, batch: StepBatch, rejected_B: torch.Tensor | None) -> torch.Tensor:
        """int64 [T, X]: the step's signals, of all layers."""
        return self._own_signals(batch, rejected_B)

    def _own_signals(self, batch: StepBatch, rejected_B: torch.Tensor | None = None) -> torch.Tensor:
        """int64 [T, X]: those of this rank's layers; rows that its check does not trust are unseen."""
        assert self._evaluator is not None
        trusted_T1 = self._check_routing(batch)
        self._count_load(batch, rejected_B, trusted_T1)
        return self._evaluator.signals(self.tap, len(batch.position_T)) * trusted_T1

    def _check_routing(self, batch: StepBatch) -> torch.Tensor:
        """The rows whose evidence can be trusted, see `LivenessCheck.check`."""
        if self._check.is_due and strikes(Stage.ROUTING):
            self.tap.clear_rows(len(batch.position_T))
        self._findings, trusted_T1 = self._check.check(self.tap, batch, self._in_force_TA)
        return trusted_T1

    def _count_load(
        self, batch: StepBatch, rejected_B: torch.Tensor | None, trusted_T1: torch.Tensor
    ) -> None:
        if self.load.is_due:
            with self.failures.caught(Stage.METRICS):
                self.load.add(self.tap, batch, self._state.next_position_S, rejected_B, trusted_T1)

    def _judge(
        self,
        req_ids: Sequence[str],
        batch: StepBatch,
        signal_TX: torch.Tensor,
        rejected_B: torch.Tensor | None,
    ) -> StepDecisions:
        """Advance the slots by a step, all of whose signals are known."""
        assert self._evaluator is not None
        if self._missed and not self._missed.isdisjoint(req_ids):
            start_B = batch.position_T[batch.query_start_B1[:-1]]
            self._state.fill_gaps(batch.slots_B, start_B)
        decisions = self._evaluator.evaluate(signal_TX, batch, self._state, rejected_B)
        if self._missed:
            self._missed.difference_update(req_ids)
        return decisions

    def _report_fault(self) -> None:
        """The other ranks wait for this one's word, whatever happened to it."""
        if self.agreement is not None:
            with self.failures.caught(Stage.RANKS):
                self.agreement.report_fault()

    def _cached_prefixes(self, req_ids: Sequence[str]) -> list[CachedPrefix]:
        """Of the requests of a step; what a failed step took from the cache stays unseen."""
        taken = [(row, req_id, self._cached.pop(req_id, None)) for row, req_id in enumerate(req_ids)]
        return [
            CachedPrefix(row, self._slot_of[req_id], *prefix)
            for row, req_id, prefix in taken
            if prefix is not None and req_id in self._slot_of
        ]

    def _replay(
        self,
        prefixes: Sequence[CachedPrefix],
        batch: StepBatch,
        rejected_B: torch.Tensor | None,
    ) -> list[ReplayedDecisions]:
        if self.kept is None or self._evaluator is None or not prefixes:
            return []
        computed_B = batch.position_T[last_rows(batch, rejected_B)] + 1
        replayed = []
        for chunk in replay_chunks(
            prefixes, self.kept.block_size, self.capacity.replay_rows, self.device
        ):
            requests = host_to_device(chunk.requests_np, self.device)
            decisions = self._evaluator.evaluate(
                self.kept.read(chunk.kv_slot_T),
                chunk.batch,
                self._state,
                computed_B=computed_B[requests],
            )
            replayed.append(ReplayedDecisions(chunk.requests_np, decisions._replace(drafts=None)))
        return replayed

    def _failed_step(self, req_ids: Sequence[str]) -> StepReport:
        self._missed.update(req_id for req_id in req_ids if req_id in self._slot_of)
        return StepReport.of_failed_step(self.program.revision, req_ids, self.failures.take())

    def idle(self) -> None:
        """The forward that follows computes dummy rows: they are nobody's, and nothing is masked."""
        self._batch, self._req_ids, self._is_whole = None, (), False
        if self.mask is not None:
            self.mask.clear_rows()
        self.is_idle = True
