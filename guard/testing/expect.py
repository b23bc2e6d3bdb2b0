"""What a case expects, against what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from guard.offline.evaluator import Outcome, result_of
from guard.policy.fault import Location
from guard.policy.model import Condition, Phase
from guard.program.program import Program
from guard.program.verdict import Firing
from guard.testing.experts import NamedRule

Values = Callable[[int], Sequence[float]]
"""Of a position: every condition's value there, NaN where it is unknown."""


class Mismatch(NamedTuple):
    """One thing that is not as expected. location: of what expected it, or of the case."""

    location: Location
    message: str


@dataclass(frozen=True)
class Happened:
    """All that a case's checks look at."""

    program: Program
    rules: Sequence[NamedRule]
    outcome: Outcome
    num_prompt_tokens: int
    values: Values

    @property
    def result(self) -> str:
        """The request's outcome, as it would be counted."""
        return result_of(self.program, self.outcome)

    def evidence(self, rule: NamedRule, position: int) -> str:
        """`rate 0.1174, above 0.12` of each of the rule's conditions, at a position."""
        values = self.values(position)
        columns = self.program.rule_table.conditions[rule.number]
        return shown(
            list(rule.rule.conditions()), [values[column] for column in columns if column >= 0]
        )


def shown(conditions: Sequence[Condition], values: Sequence[float]) -> str:
    """Values with the thresholds that they meet or miss."""
    parts = []
    for condition, value in zip(conditions, values, strict=True):
        number = "unknown" if math.isnan(value) else f"{value:.6g}"
        limit = (
            ""
            if condition.kind == "always"
            else (f", {condition.comparison.value} {condition.threshold:.6g}")
        )
        parts.append(f"{condition.label} {number}{limit}")
    return "; ".join(parts)


def shown_firing(rule: NamedRule, firing: Firing) -> str:
    evidence = shown(list(rule.rule.conditions()), [one.value for one in firing.evidence])
    return f"at {firing.position} ({evidence})"


@dataclass(frozen=True)
class RuleFires:
    """A rule fires at these positions, or so often within others."""

    location: Location
    rule: NamedRule
    at: tuple[int, ...] | None = None
    first: int = 0
    last: int | None = None
    phase: Phase = Phase.ANY
    times: int | None = 1  # None: at least once
    exempt: bool | None = None

    def claims(self, firing: Firing, num_prompt_tokens: int) -> bool:
        position = firing.position
        if (firing.policy, firing.rule) != (self.rule.policy.name, self.rule.rule.name):
            return False
        if self.at is not None:
            return position in self.at
        in_prompt = position < num_prompt_tokens
        in_phase = self.phase is Phase.ANY or in_prompt == (self.phase is Phase.PROMPT)
        return in_phase and position >= self.first and (self.last is None or position <= self.last)

    def check(self, happened: Happened) -> list[Mismatch]:
        of_rule = [
            firing
            for firing in happened.outcome.verdict.firings
            if (firing.policy, firing.rule) == (self.rule.policy.name, self.rule.rule.name)
        ]
        claimed = [one for one in of_rule if self.claims(one, happened.num_prompt_tokens)]
        mismatches = []
        if not happened.outcome.rules.applies_R[self.rule.number] and self.times != 0:
            text = f"{self.rule.name} does not apply to this request: its match asks for another"
            return [Mismatch(self.location, text)]
        if self.at is not None:
            for position in sorted(set(self.at) - {firing.position for firing in claimed}):
                text = (
                    f"expected {self.rule.name} to fire at {position}; {_instead(self.rule, of_rule)}"
                )
                text += f". At {position}: {happened.evidence(self.rule, position)}"
                mismatches.append(Mismatch(self.location, text))
        elif not claimed if self.times is None else len(claimed) != self.times:
            text = f"expected {self.rule.name} to fire {self._how()}; {_instead(self.rule, of_rule)}"
            if not of_rule:
                nearest = _nearest(self.rule, happened)
                text += f". Nearest to its threshold: {nearest}" if nearest else ""
            mismatches.append(Mismatch(self.location, text))
        is_exempt = bool(happened.outcome.rules.exempt_R[self.rule.number])
        if self.exempt is not None and is_exempt is not self.exempt:
            how = "an exception" if self.exempt else "no exception"
            text = f"expected {how} to hold {self.rule.name} back for this request"
            mismatches.append(Mismatch(self.location, text))
        return mismatches

    def _how(self) -> str:
        often = {None: "", 0: "never", 1: "once"}.get(self.times, f"{self.times} times")
        where = "" if self.phase is Phase.ANY else f"in the {self.phase}"
        if self.first or self.last is not None:
            where += f" from {self.first}" + ("" if self.last is None else f" to {self.last}")
        return " ".join(filter(None, [often, where.strip()]))


@dataclass(frozen=True)
class OutcomeIs:
    location: Location
    outcome: str
    by: NamedRule | None = None

    def check(self, happened: Happened) -> list[Mismatch]:
        if happened.result != self.outcome:
            fired = ", ".join(
                f"{f.policy}/{f.rule} at {f.position}" for f in happened.outcome.verdict.firings[:8]
            )
            text = f"expected outcome {self.outcome}, found {happened.result}"
            return [
                Mismatch(self.location, f"{text} ({f'fired: {fired}' if fired else 'nothing fired'})")
            ]
        blocked = happened.outcome.verdict.blocked
        if self.by is not None and blocked is not None:
            name = f"{blocked.policy}/{blocked.rule}"
            if name != self.by.name:
                text = (
                    f"expected {self.by.name} to block the request; {name} did, at {blocked.position}"
                )
                return [Mismatch(self.location, text)]
        return []


@dataclass(frozen=True)
class MaskHolds:
    location: Location
    rule: NamedRule
    first: int | None = None
    until: int | None = None
    to_end: bool = False

    def claims(self, interval: tuple[int, int | None]) -> bool:
        start, stop = interval
        if self.first is not None and start != self.first:
            return False
        return (not self.to_end and self.until is None) or stop == self.until

    def check(self, happened: Happened) -> list[Mismatch]:
        intervals = intervals_of(self.rule, happened)
        if any(self.claims(interval) for interval in intervals):
            return []
        first = "" if self.first is None else f" from {self.first}"
        until = " to the end" if self.to_end else "" if self.until is None else f" until {self.until}"
        found = ", ".join(map(_interval, intervals)) or "it never masked"
        if not intervals and not happened.outcome.rules.enforced_R[self.rule.number]:
            found += ": it is not enforced for this request (mode, exceptions, request.enforce)"
        return [
            Mismatch(self.location, f"expected the mask of {self.rule.name}{first}{until}; {found}")
        ]


Check = RuleFires | OutcomeIs | MaskHolds


@dataclass(frozen=True)
class Expected:
    """location: of the case; exact: decisions that nothing here names are failures"""

    location: Location
    checks: tuple[Check, ...] = ()
    exact: bool = True

    def mismatches(self, happened: Happened) -> list[Mismatch]:
        found = [mismatch for check in self.checks for mismatch in check.check(happened)]
        if self.exact:
            found += self._not_expected(happened)
        return found

    def _not_expected(self, happened: Happened) -> list[Mismatch]:
        found = []
        named = [check for check in self.checks if isinstance(check, RuleFires)]
        rules = {(rule.policy.name, rule.rule.name): rule for rule in happened.rules}
        for firing in happened.outcome.verdict.firings:
            if not any(check.claims(firing, happened.num_prompt_tokens) for check in named):
                rule = rules[firing.policy, firing.rule]
                text = f"{rule.name} fired {shown_firing(rule, firing)}, which is not expected"
                found.append(Mismatch(self.location, text))
        masks = [check for check in self.checks if isinstance(check, MaskHolds)]
        for rule in {check.rule.number: check.rule for check in masks}.values():
            for interval in intervals_of(rule, happened):
                if not any(check.rule == rule and check.claims(interval) for check in masks):
                    text = f"{rule.name} masked {_interval(interval)}, which is not expected"
                    found.append(Mismatch(self.location, text))
        return found


def intervals_of(rule: NamedRule, happened: Happened) -> list[tuple[int, int | None]]:
    return [
        (mask.start, mask.stop)
        for mask in happened.outcome.verdict.masks
        if (mask.policy, mask.rule) == (rule.policy.name, rule.rule.name)
    ]


def _interval(interval: tuple[int, int | None]) -> str:
    start, stop = interval
    return f"from {start} " + ("to the end" if stop is None else f"until {stop}")


def _instead(rule: NamedRule, firings: Sequence[Firing]) -> str:
    if not firings:
        return "it did not fire"
    more = f" and {len(firings) - 4} more times" if len(firings) > 4 else ""
    return "it fired " + ", ".join(shown_firing(rule, firing) for firing in firings[:4]) + more


def _nearest(rule: NamedRule, happened: Happened) -> str:
    columns = happened.program.rule_table.conditions[rule.number]
    values = [float(happened.outcome.extremes_C[column]) for column in columns if column >= 0]
    return shown(list(rule.rule.conditions()), values)
