"""A suite's cases, ready to be evaluated: routing, what is known of the request, what must happen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guard.offline.evaluator import OfflineRequest
from guard.policy.explain import path_text
from guard.policy.fault import Fault, Location
from guard.policy.model import Phase
from guard.program.applicability import RequestFacts, utc_today
from guard.program.verdict import Routing
from guard.testing.expect import Check, Expected, MaskHolds, OutcomeIs, RuleFires
from guard.testing.experts import SuiteError, Words
from guard.testing.schema import (
    MAX_CASE_TOKENS,
    CaseSpec,
    Expectation,
    MaskExpectation,
    Position,
    RequestSpec,
    SegmentSpec,
)
from guard.testing.suite import Suite
from guard.testing.thresholds import threshold_cases
from guard.testing.tokens import TokenMaker, Tokens, routing_of

_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    name: str
    location: Location
    request: OfflineRequest
    expected: Expected


class CaseBuilder:
    """Builds the cases of one suite, and collects what is wrong with them."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self.words = Words(suite.policies, suite.topology)
        self._maker = TokenMaker(suite.topology, self.words, suite.baselines)
        self.faults: list[Fault] = []

    def build(self, wanted: str | None = None) -> Iterator[Case]:
        """wanted: only cases whose name has this in it."""
        for index, spec in enumerate(self._suite.document.cases):
            path: _Path = ("cases", index)
            place = self._suite.place(*path, "name")
            try:
                facts = self._facts(spec.request, path)
                for case in self._cases(spec, facts, path, place):
                    if wanted is None or wanted in f"{self._suite.name} {case.name}":
                        yield case
            except SuiteError as error:
                self._add_fault(path, error)

    def _cases(
        self, spec: CaseSpec, facts: RequestFacts, path: _Path, place: Location
    ) -> Iterator[Case]:
        if spec.threshold is None:
            prompt = self._tokens(spec.prompt or (SegmentSpec(tokens=1),), (*path, "prompt"))
            output = self._tokens(spec.output, (*path, "output"))
            routing = routing_of(prompt, output)
            if (positions := len(routing.topk_ids)) > MAX_CASE_TOKENS:
                raise SuiteError("", f"a case of {positions} tokens; at most {MAX_CASE_TOKENS}")
            checks = self._checks(spec.expect or (), path, routing)
            expected = Expected(place, checks, exact=spec.also is None)
            yield Case(spec.name, place, OfflineRequest(routing, facts), expected)
            return
        where = (*path, "threshold")
        try:
            rule = self.words.rule(spec.threshold.rule)
            condition = self.words.condition(rule, spec.threshold.condition)
            made = threshold_cases(rule, condition, self._maker)
        except SuiteError as error:
            self._add_fault(where, error)
            return
        for one in made:
            fires = RuleFires(place, rule, times=None if one.fires else 0)
            expected = Expected(place, (fires,), exact=False)
            name = f"{spec.name} [{one.name}]"
            yield Case(name, place, OfflineRequest(one.routing, facts), expected)

    def _facts(self, spec: RequestSpec, path: _Path) -> RequestFacts:
        for index, name in enumerate(spec.enforce):
            try:
                self.words.policy(name, "")
            except SuiteError as error:
                self._add_fault((*path, "request", "enforce", index), error)
        return RequestFacts(
            request_id=spec.id or "",
            labels=spec.labels,
            lora_adapter=spec.lora_adapter,
            today=spec.date or utc_today(),
            enforced=frozenset(spec.enforce),
        )

    def _tokens(self, segments: tuple[SegmentSpec, ...], path: _Path) -> list[Tokens]:
        made = []
        for index, segment in enumerate(segments):
            try:
                made.append(self._maker.make(segment))
            except SuiteError as error:
                self._add_fault((*path, index), error)
                made.append(self._maker.fill([[[] for _ in self._suite.topology.layers]]))
        return made

    def _checks(self, specs: Sequence[Expectation], path: _Path, routing: Routing) -> tuple[Check, ...]:
        checks = []
        for index, spec in enumerate(specs):
            where = (*path, "expect", index)
            try:
                checks.append(self._check(spec, self._suite.place(*where), routing))
            except SuiteError as error:
                inside = (*where, "mask") if spec.mask is not None else where
                self._add_fault(inside, error)
        return tuple(checks)

    def _check(self, spec: Expectation, place: Location, routing: Routing) -> Check:
        last = len(routing.topk_ids) - 1

        def position(asked: Position, key: str) -> int:
            found = asked.resolve(routing.num_prompt_tokens)
            if found > last:
                text = f"position {found} is behind the last one of the case, {last}"
                raise SuiteError(key, text)
            return found

        if spec.mask is not None:
            return self._mask_check(spec.mask, place, routing.num_prompt_tokens)
        if spec.outcome is not None:
            return OutcomeIs(place, spec.outcome, self.words.rule(spec.by, "by") if spec.by else None)
        assert spec.rule is not None, "the schema asks for one of the three"
        return RuleFires(
            place,
            self.words.rule(spec.rule),
            at=None if spec.at is None else tuple(position(one, "at") for one in spec.at),
            first=0 if spec.from_ is None else position(spec.from_, "from"),
            last=None if spec.to is None else position(spec.to, "to"),
            phase=spec.phase or Phase.ANY,
            times=1 if spec.times is None else spec.times,
            exempt=spec.exempt,
        )

    def _mask_check(self, spec: MaskExpectation, place: Location, num_prompt_tokens: int) -> MaskHolds:
        to_end = spec.until == "end"
        until = spec.until if isinstance(spec.until, Position) else None
        return MaskHolds(
            place,
            self.words.rule(spec.rule),
            None if spec.from_ is None else spec.from_.resolve(num_prompt_tokens),
            None if until is None else until.resolve(num_prompt_tokens),
            to_end,
        )

    def _add_fault(self, path: _Path, error: SuiteError) -> None:
        whole = (*path, error.key) if error.key else path
        place = self._suite.place(*whole)
        self.faults.append(Fault(place, f"{path_text(whole)}: {error.text}"))
