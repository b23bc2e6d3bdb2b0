"""Reads what `moe-guard calibrate` is given, and calibrates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from guard.cli.calibrate_report import facts
from guard.cli.documents import read_document, sha256
from guard.cli.record import read_prompts
from guard.discover.calibration import Calibrated, Measured, Split, calibrate
from guard.discover.errors import DiscoverError
from guard.discover.sequential import (
    SequentialOutcome,
    SequentialSplit,
    calibrate_sequential,
    chosen,
)
from guard.discover.text_baseline import TextBaseline, Texts, text_baseline
from guard.policy.fault import Location
from guard.policy.model import Phase
from guard.policy.profile import load_profile
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.policy.texts import Text
from guard.program.topology import Topology
from guard.trace.format import TracedRequest
from guard.trace.reader import TraceReader, trace_files

DIRECTIONS = ("above", "below")


@dataclass(frozen=True, slots=True)
class Roles:
    """Names and values of labels. target: None: nothing is to be detected"""

    label: str
    target: str | None
    reference: str
    pair: str


@dataclass
class CalibrationRun:
    """requests: those of either label, of all traces; others: of traces that thresholds are not taken
    from; text: of the profile"""

    profile: Mapping[str, Any]
    topology: Topology
    conditions: Sequence[Measured]
    budgets: Sequence[float]
    roles: Roles
    requests: Sequence[TracedRequest]
    files: Sequence[Path]
    seed: int
    text: Text
    others: Sequence[TracedRequest] = ()
    found: list[Calibrated] = field(default_factory=list)
    sequential: dict[str, list[SequentialOutcome]] = field(default_factory=dict)
    baseline: TextBaseline | None = None

    @staticmethod
    def start(
        traces: Sequence[Path],
        profile: Path,
        conditions: Path | None,
        budgets: Sequence[float],
        roles: Roles,
        seed: int,
        held_out_traces: Sequence[Path] = (),
    ) -> CalibrationRun:
        """Raises GuardError."""
        known = read_document(profile)
        files, other_files = (
            [file for path in paths for file in trace_files(path)]
            for paths in (traces, held_out_traces)
        )
        readers = [TraceReader(file) for file in (*files, *other_files)]
        topology = readers[0].header.topology
        for reader in readers[1:]:
            if reader.header.topology != topology:
                raise DiscoverError(
                    f"{reader.path}: is of another model than {files[0]}; calibrate them apart"
                )
        requests = _labelled(readers[: len(files)], roles)
        others = _labelled(readers[len(files) :], roles) if other_files else []
        measured = _measured(known.get("thresholds", []) if conditions is None else _yaml(conditions))
        text = Text(str(profile), json.dumps(known))
        return CalibrationRun(
            known,
            topology,
            measured,
            budgets,
            roles,
            requests,
            [*files, *other_files],
            seed,
            text,
            others,
        )

    def calibrate(
        self,
        held_out: float,
        prompts: Path | None,
        sequential: Sequence[str],
        held_out_prompts: Path | None = None,
    ) -> None:
        """held_out: the share of prompts that is set aside, where there are no other traces
        prompts, held_out_prompts: for a baseline that reads words alone
        sequential: sets that the sequential tests read

        Raises GuardError.
        """
        known, fresh = self.requests, self.others
        if not fresh:
            is_fresh = self._set_aside(held_out)
            known, fresh = (
                [request for request in self.requests if is_fresh[self._group(request)] is side]
                for side in (False, True)
            )
        split = Split(
            [one.routing for one in self._of(known, "benign")],
            [one.routing for one in self._of(fresh, "benign")],
            [one.routing for one in self._of(fresh, "target")],
        )
        self.found = calibrate(self.profile, self.topology, self.conditions, self.budgets, split)
        if prompts is not None and self.roles.target is not None:
            fresh_prompts = held_out_prompts if self.others else prompts
            if fresh_prompts is None:
                raise DiscoverError(
                    "the words alone are compared on the prompts of --held-out-trace; give their file "
                    "with --held-out-prompts"
                )
            sides = self._texts(known, prompts), self._texts(fresh, fresh_prompts)
            self.baseline = text_baseline(sides[0], sides[1], self.budgets, seed=self.seed)
        self.sequential = {name: self._sequential(name, known, fresh) for name in sequential}

    def _sequential(
        self, name: str, known: Sequence[TracedRequest], fresh: Sequence[TracedRequest]
    ) -> list[SequentialOutcome]:
        experts = self._experts(name)

        def side(requests: Sequence[TracedRequest], which: str) -> list[np.ndarray]:
            own = self._of(requests, which)
            return [chosen(one.routing, self.topology, experts) for one in own]

        benign = side(known, "benign")
        # Those that rates are taken from are not calibrated on.
        num_rates = len(benign) // 4
        split = SequentialSplit(
            benign[:num_rates],
            side(known, "target"),
            benign[num_rates:],
            side(fresh, "benign"),
            side(fresh, "target"),
        )
        return calibrate_sequential(split, self.budgets)

    def _experts(self, name: str) -> list[tuple[int, int]]:
        sets = load_profile(self.text, Location(self.text.file)).sets
        if name not in sets:
            hint = did_you_mean(name, sets) or f"; it has {one_of(sorted(sets), 'and')}"
            raise DiscoverError(f"{self.text.file}: has no set {quote(name)}{hint}")
        return sorted(sets[name].weights)

    def _set_aside(self, held_out: float) -> dict[str, bool]:
        """By group, whether its prompts are."""
        groups = sorted({self._group(request) for request in self.requests})
        order = np.random.default_rng(self.seed).permutation(len(groups)).tolist()
        num_fresh = round(held_out * len(groups))
        return {groups[n]: place < num_fresh for place, n in enumerate(order)}

    def _group(self, request: TracedRequest) -> str:
        return request.labels.get(self.roles.pair) or f"request {request.request_id}"

    def _of(self, requests: Sequence[TracedRequest], side: str) -> list[TracedRequest]:
        value = self.roles.target if side == "target" else self.roles.reference
        return [request for request in requests if request.labels[self.roles.label] == value]

    def _texts(self, requests: Sequence[TracedRequest], prompts: Path) -> Texts:
        text_of = {str(n): _text(one) for n, one in enumerate(read_prompts(prompts), 1)}
        for request in requests:
            if request.request_id not in text_of:
                raise DiscoverError(
                    f"{prompts}: has no line {request.request_id} with a prompt: the trace was "
                    "recorded of other prompts"
                )
        target, benign = (
            [text_of[request.request_id] for request in self._of(requests, side)]
            for side in ("target", "benign")
        )
        return Texts(target, benign)

    def profile_with_thresholds(self) -> dict[str, Any]:
        """The profile, with what was calibrated; thresholds of other conditions stay as they are."""
        provenance = self.profile.get("provenance")
        new = [one.as_threshold() for one in self.found]
        measured = [_place(one) for one in new]
        kept = [one for one in self.profile.get("thresholds", []) if _place(one) not in measured]
        names = [str(one.condition) for one in self.found]
        return {
            **self.profile,
            "thresholds": [*kept, *new],
            "provenance": {
                **(provenance if isinstance(provenance, dict) else {"before": provenance}),
                "calibration": {
                    "command": "moe-guard calibrate",
                    "seed": self.seed,
                    "traces": {path.name: sha256(path) for path in self.files},
                    "conditions": [
                        *(one for one in self._calibrated_before() if one["condition"] not in names),
                        *(facts(one) for one in self.found),
                    ],
                },
            },
        }

    def _calibrated_before(self) -> list[dict[str, Any]]:
        """As a run of this command left it."""
        provenance = self.profile.get("provenance")
        before = provenance.get("calibration", {}) if isinstance(provenance, dict) else {}
        conditions = before.get("conditions", []) if isinstance(before, dict) else []
        return [one for one in conditions if isinstance(one, dict) and "condition" in one]


def _labelled(readers: Sequence[TraceReader], roles: Roles) -> list[TracedRequest]:
    """Requests of either label. Raises DiscoverError where one has none."""
    wanted = {roles.target, roles.reference} - {None}
    found = [
        request for reader in readers for request in reader if request.labels.get(roles.label) in wanted
    ]
    for value in sorted(filter(None, wanted)):
        if not any(request.labels[roles.label] == value for request in found):
            names = ", ".join(str(reader.path) for reader in readers)
            raise DiscoverError(f"{names}: no prompt has {roles.label} {quote(value)}")
    return found


def _place(threshold: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What it is the threshold of."""
    return threshold.get("phase", Phase.ANY.value), threshold["when"]


def _measured(entries: object) -> list[Measured]:
    if not isinstance(entries, list) or not entries:
        raise DiscoverError(
            "there is no condition to calibrate: the profile has no thresholds; give a file of them "
            "with --conditions"
        )
    found = []
    for number, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("when"), dict)
            or len(entry["when"]) != 1
        ):
            raise DiscoverError(f"conditions[{number}]: needs `when` with one condition and its words")
        phases = [phase.value for phase in Phase]
        phase = entry.get("phase", Phase.ANY.value)
        if phase not in phases:
            raise DiscoverError(
                f"conditions[{number}]: phase is {one_of(phases)}, not {quote(str(phase))}"
            )
        budgets = entry.get("budgets") or [{}]
        pointed = next((one for one in DIRECTIONS if one in budgets[0]), "above")
        direction = entry.get("alarm", pointed)
        if direction not in DIRECTIONS:
            raise DiscoverError(
                f"conditions[{number}]: alarm is {one_of(DIRECTIONS)}, not {quote(str(direction))}"
            )
        found.append(Measured(Phase(phase), entry["when"], direction))
    return found


def _text(prompt: Mapping[str, Any]) -> str:
    """Of a chat, the texts of its messages."""
    if "prompt" in prompt:
        return str(prompt["prompt"])
    return "\n".join(str(message.get("content", "")) for message in prompt["messages"])


def _yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DiscoverError(f"{path}: cannot be read as YAML: {error}") from error
