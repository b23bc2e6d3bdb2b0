"""Reads what `moe-guard causal` is given, and judges what vLLM found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from guard.cli.documents import read_document, sha256
from guard.cli.record import read_prompts
from guard.discover.baselines import use_of_experts
from guard.discover.causal import (
    CausalCheck,
    CausalDemands,
    ExpertId,
    Losses,
    TaskOutcome,
    causal_check,
    random_sets,
)
from guard.discover.errors import DiscoverError
from guard.policy.fault import Location
from guard.policy.profile import load_profile
from guard.policy.suggest import did_you_mean, one_of, quote
from guard.policy.texts import Text
from guard.trace.reader import trace_files

Texts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Labels:
    """The name of the label, and its values."""

    label: str
    target: str
    reference: str


@dataclass(frozen=True)
class CausalRun:
    """texts: those of the target, then those of the reference; data: SHA-256 by file name"""

    profile: Mapping[str, Any]
    set_name: str
    experts: Sequence[ExpertId]
    random: Sequence[Sequence[ExpertId]]
    texts: Texts
    num_target: int
    tasks: Texts
    data: Mapping[str, str]
    seed: int

    @staticmethod
    def prepare(
        profile: Path,
        set_name: str,
        traces: Sequence[Path],
        texts: Path,
        tasks: Path | None,
        labels: Labels,
        num_random: int,
        seed: int,
    ) -> CausalRun:
        """Raises GuardError; exits at a bad line of the texts."""
        known = read_document(profile)
        sets = load_profile(Text(str(profile), json.dumps(known)), Location(str(profile))).sets
        if set_name not in sets:
            hint = did_you_mean(set_name, sets) or f"; it has {one_of(sorted(sets), 'and')}"
            raise DiscoverError(f"{profile}: has no set {quote(set_name)}{hint}")
        experts = [(layer, expert) for layer, expert in sorted(sets[set_name].weights)]
        files = [file for path in traces for file in trace_files(path)]
        use = use_of_experts(files)
        for layer, expert in experts:
            if (layer, expert) not in use:
                raise DiscoverError(
                    f"{profile}: {set_name} names L{layer}/E{expert}, which the model of {files[0]} "
                    "does not have: they are of different models"
                )
        asked = read_prompts(texts)
        sides = [
            [one for one in asked if one["labels"].get(labels.label) == value]
            for value in (labels.target, labels.reference)
        ]
        for value, side in zip((labels.target, labels.reference), sides, strict=True):
            if not side:
                raise DiscoverError(f"{texts}: no text has {labels.label} {quote(value)}")
        exact = [] if tasks is None else read_prompts(tasks)
        for number, one in enumerate(exact, start=1):
            if "answer" not in one["labels"]:
                raise DiscoverError(f"{tasks}: the task number {number} has no `answer`")
        given = [*files, texts, *([] if tasks is None else [tasks])]
        return CausalRun(
            known,
            set_name,
            experts,
            random_sets(experts, use, num_random, seed),
            [*sides[0], *sides[1]],
            len(sides[0]),
            [one | {"answer": one["labels"]["answer"]} for one in exact],
            {path.name: sha256(path) for path in given},
            seed,
        )

    def job(
        self, model: str, method: str, max_tokens: int, out: Path, vllm: Mapping[str, Any]
    ) -> dict[str, Any]:
        """For `guard_vllm.causal_offline`."""
        return {
            "model": model,
            "texts": self.texts,
            "tasks": self.tasks,
            "sets": [self.experts, *self.random],
            "method": method,
            "max_tokens": max_tokens,
            "out": str(out),
            "vllm": dict(vllm),
        }

    def check(self, measured: Mapping[str, Any], method: str, demands: CausalDemands) -> CausalCheck:
        """measured: what the job found. Raises DiscoverError."""
        target, reference = (
            _losses(measured["texts"][part])
            for part in (slice(None, self.num_target), slice(self.num_target, None))
        )
        task = None
        if self.tasks:
            unmasked_N, masked_N, *random_SN = np.array(measured["tasks"], dtype=bool).T
            task = TaskOutcome(unmasked_N, masked_N, np.array(random_SN))
        return causal_check(method, target, reference, task, demands, self.seed)

    def profile_with(self, check: CausalCheck, override: str) -> dict[str, Any]:
        outcome = check.as_profile(self.data)
        if override and not check.passed:
            outcome["override"] = override
        causal = {**self.profile.get("causal", {}), self.set_name: outcome}
        return {**self.profile, "causal": causal}

    def table(self, check: CausalCheck) -> Table:
        table = Table("masked", "target, nats a token", "reference", "exact tasks")
        task = check.task
        low, high = check.target_interval
        kept_low, kept_high = check.reference_interval
        table.add_row(
            f"{self.set_name} ({len(self.experts)})",
            f"{check.target_increase:+.3f} ({low:+.3f} {high:+.3f})",
            f"{check.reference_increase:+.2%} ({kept_low:+.2%} {kept_high:+.2%})",
            "" if task is None else f"{task.masked_N.mean():.1%}",
        )
        rows = zip(check.random_increases, check.random_reference_increases, strict=True)
        for number, (increase, kept) in enumerate(rows):
            right = "" if task is None else f"{task.random_SN[number].mean():.1%}"
            table.add_row(f"random {number + 1}", f"{increase:+.3f}", f"{kept:+.2%}", right)
        if task is not None:
            table.add_row("nothing", "", "", f"{task.unmasked_N.mean():.1%}")
        return table


def _losses(texts: Sequence[Mapping[str, Any]]) -> Losses:
    tokens_N = np.array([text["tokens"] for text in texts])
    unmasked_N, masked_N, *random_SN = np.array([text["losses"] for text in texts]).T
    return Losses(tokens_N, unmasked_N, masked_N, np.array(random_SN))
