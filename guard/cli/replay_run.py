"""Reads traces with a progress bar, and replays policies over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from guard.cli.output import err
from guard.errors import GuardError
from guard.offline.evaluator import OfflineEvaluator, result_of
from guard.offline.replay import Replayed, Summary, Sweep, SweepPoint, replay, without_mass
from guard.offline.sample import Sample
from guard.policy import PolicySet, load_policies
from guard.policy.model import Mode
from guard.policy.scalars import MAX_NUMBER
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files


class ReplayError(GuardError):
    """A replay that cannot be done as asked."""


@dataclass
class Wanted:
    """A sweep that was asked for. thresholds: None where the command chooses them."""

    sweep: Sweep
    number: int  # of the condition in the program
    thresholds: list[float] | None
    extremes: Sample = field(default_factory=Sample)


@dataclass
class Replay:
    """Policies, and the traces that they are replayed over. warnings: for people, when it is done"""

    policies: PolicySet
    program: Program
    traces: Sequence[TraceReader]
    enforce: Sequence[str]
    wanted: Sequence[Wanted]
    warnings: list[str]

    @staticmethod
    def start(
        paths: Sequence[Path], policies_at: Path, sweeps: Sequence[str], enforce: Sequence[str]
    ) -> Replay:
        """Raises GuardError."""
        policies = load_policies(policies_at)
        traces = [TraceReader(file) for path in paths for file in trace_files(path)]
        first = traces[0].header
        for trace in traces[1:]:
            if trace.header.topology != first.topology:
                raise ReplayError(
                    f"{trace.path}: is of another model than {traces[0].path}: {trace.header.model!r} "
                    f"and {first.model!r} differ in their MoE layers; replay them apart"
                )
        warnings = []
        if any(trace.header.weights is None for trace in traces):
            policies, left_out = without_mass(policies)
            if left_out:
                warnings.append(
                    "without gate weights in the trace, rules with `mass` are left out: "
                    f"{', '.join(left_out)}; record with weights to replay them"
                )
        names = [policy.name for policy in policies.policies]
        off = {policy.name for policy in policies.policies if policy.mode is Mode.OFF}
        for name in enforce:
            if name not in names:
                hint = did_you_mean(name, names) or f"; there is {one_of(names, 'and')}"
                raise ReplayError(f"--enforce: there is no policy {quote(name)}{hint}")
            if name in off:
                raise ReplayError(f"--enforce: the policy {quote(name)} is off; set its mode to audit")
        program = compile_policies(policies, first.topology)
        wanted = [_wanted(text, policies, program) for text in sweeps]
        return Replay(policies, program, traces, enforce, wanted, warnings)

    @property
    def model(self) -> str:
        return self.traces[0].header.model

    def replayed(self) -> Iterator[Replayed]:
        evaluator = OfflineEvaluator(self.program)
        yield from replay(evaluator, self.requests("Replaying"), self.enforce)
        for trace in self.traces:
            if trace.torn:
                self.warnings.append(
                    f"{trace.path}: ends within a request, as after a crash; that one is lost"
                )

    def requests(self, doing: str) -> Iterator[TracedRequest]:
        """Of all traces in turn, with a progress bar where someone is looking."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task(doing, total=sum(trace.size for trace in self.traces))
            before = 0
            for trace in self.traces:
                for request in trace:
                    yield request
                    progress.update(task, completed=before + trace.offset)
                before += trace.size

    def summary(self) -> Summary:
        """Replays once; what a sweep needs to choose its thresholds is noted on the way."""
        summary = Summary(self.program)
        for one in self.replayed():
            summary.add(one.outcome, result_of(self.program, one.outcome))
            for wanted in self.wanted:
                extreme = float(one.outcome.extremes_C[wanted.number])
                if not math.isnan(extreme):
                    wanted.extremes.add(extreme)
        return summary

    def sweeps(self) -> list[tuple[Sweep, list[SweepPoint]]]:
        """After `summary`."""
        results = []
        for wanted in self.wanted:
            thresholds = wanted.thresholds
            if thresholds is None:
                thresholds = wanted.sweep.thresholds(wanted.extremes.kept)
            points = wanted.sweep.run(thresholds, self.requests(f"Sweeping {wanted.sweep.name}"))
            results.append((wanted.sweep, points))
        return results


def _wanted(text: str, policies: PolicySet, program: Program) -> Wanted:
    """Of RULE/CONDITION or RULE/CONDITION=a,b,c. Raises ReplayError."""
    name, _, values = text.partition("=")
    rule_name, _, label = name.rpartition("/")
    policy_name, _, short_name = rule_name.rpartition("/")
    found = [
        (number, rule)
        for number, rule in enumerate(program.rules)
        if rule.rule == short_name and policy_name in ("", rule.policy)
    ]
    choices = [
        f"{rule.policy}/{rule.rule}/{one}" for rule in program.rules for one in rule.condition_labels
    ]
    if len(found) != 1 or label not in found[0][1].condition_labels:
        hint = did_you_mean(name, choices)
        if len(found) > 1:
            hint = f"; several policies have such a rule: write POLICY/{name}"
        known = hint or f"; there is {one_of(choices[:8], 'and')}"
        raise ReplayError(f"--sweep: there is no condition {quote(name)}{known}")
    number, rule = found[0]
    thresholds = None
    if values:
        try:
            thresholds = [float(value) for value in values.split(",")]
        except ValueError:
            thresholds = [math.nan]
        if not all(abs(threshold) <= MAX_NUMBER for threshold in thresholds):
            raise ReplayError(f"--sweep: {quote(values)} is no list of numbers such as 0.1,0.2")
    sweep = Sweep(policies, program.topology, rule.policy, rule.rule, label)
    column = program.rule_table.conditions[number][rule.condition_labels.index(label)]
    if label == "always":
        raise ReplayError("--sweep: `always` has no threshold")
    return Wanted(sweep, int(column), thresholds)
