"""A stand-in for an engine: says which expert each row goes to, and reads what the guard decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from guard.device.layout import Capacity
from guard.policy import parse_policies
from guard.program.compile import compile_policies
from guard.program.program import Program
from guard.program.step_report import NEVER, EventColumn, RequestColumn, StepReport
from guard.program.topology import MoELayer, Topology
from guard.runtime import Guard
from tests.support.opened import opened

TOPOLOGY = Topology("TestMoeForCausalLM", (MoELayer(0, 8, 2), MoELayer(1, 8, 2)))
FLAGGED, OTHER = 3, 1


def policy_text(rules: str, *, name: str = "p", mode: str = "enforce", extra: str = "") -> str:
    """A policy with the set `f`: expert 3 of layer 0."""
    return (
        "apiVersion: moe-guard/v1\nkind: Policy\n"
        f"metadata: {{name: {name}}}\n"
        f"spec:\n  mode: {mode}\n{extra}"
        "  experts: {f: [{layer: 0, experts: [3]}]}\n"
        f"  rules:\n{rules}\n"
    )


def rule_text(when: str, then: str = "", *, name: str = "r", rest: str = "") -> str:
    action = f", then: {then}" if then else ""
    return f"    - {{name: {name}, when: {when}{action}{rest}}}\n"


COUNT = "{count: {experts: f, over: token, atLeast: 1}}"
MASK = "{mask: {experts: f}}"
BLOCK = "{block: {message: Stopped.}}"


class Engine:
    """Runs a guard's steps. Rows go to the expert named for them, and to expert 7, in each layer."""

    def __init__(
        self,
        text: str,
        *,
        max_slots: int = 4,
        masking: bool = True,
        max_draft_tokens: int = 0,
        compiled: Program | None = None,
    ) -> None:
        self.program = compiled or compile_policies(parse_policies(text), TOPOLOGY)
        capacity = Capacity(2048, max_slots, max(1, self.program.masks.num_words), max_draft_tokens)
        self.guard = Guard(self.program, capacity, torch.device("cpu"), masking=masking)

    def step(
        self,
        rows: Mapping[str, tuple[int, Sequence[int]]],
        rejected: Sequence[int] | None = None,
    ) -> StepReport:
        """rows: of each request its first position and the expert of each row."""
        counts = [len(experts) for _, experts in rows.values()]
        positions = [np.arange(start, start + len(e)) for start, e in rows.values()]
        self.guard.idle()
        self.guard.begin_step(
            list(rows),
            torch.from_numpy(np.cumsum([0, *counts])),
            torch.from_numpy(np.concatenate(positions)),
        )
        chosen = torch.tensor([e for _, experts in rows.values() for e in experts])
        ids = torch.stack([chosen, torch.full_like(chosen, 7)], dim=1)
        for layer in range(len(TOPOLOGY.layers)):
            self.guard.tap.record(layer, ids, torch.full(ids.shape, 0.5))
        pending = self.guard.end_step(None if rejected is None else torch.tensor(rejected))
        report = opened(pending, self.guard)
        assert report is not None
        return report

    def masked_rows(self, num_rows: int) -> list[bool]:
        mask = self.guard.mask
        assert mask is not None
        return mask.wanted(0, mask.row_bits_TW[:num_rows]).excluded_TE[:, FLAGGED].tolist()


def fired(report: StepReport) -> list[tuple[str, int]]:
    """(request, position) of each firing that the report holds."""
    return [
        (report.req_ids[event[EventColumn.REQUEST]], int(event[EventColumn.POSITION]))
        for event in report.events_V
    ]


def tokens(report: StepReport, row: int = 0) -> tuple[int, int]:
    facts = report.requests_B[row]
    return int(facts[RequestColumn.PROMPT_TOKENS]), int(facts[RequestColumn.OUTPUT_TOKENS])


def block_position(report: StepReport, num_rules: int, row: int = 0) -> int | None:
    key = int(report.requests_B[row, RequestColumn.BLOCK_KEY])
    return None if key >= NEVER else key // num_rules
