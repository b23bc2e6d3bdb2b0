"""Builds step reports by hand: rules as the engine core knows them, rows as the workers report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from guard.events.message import Decision, EvidenceFacts, Hello, RuleFacts, SetFacts
from guard.program.step_report import (
    NEVER,
    EventColumn,
    Finding,
    Judged,
    PackedFlag,
    PackedReport,
    ReportForm,
    RequestColumn,
    RoutingCheck,
    StepReport,
    StepSummary,
)


def rule(
    name: str,
    action: str = "observe",
    *,
    policy: str = "p",
    mode: str = "enforce",
    phase: str = "any",
    on_error: str = "open",
) -> RuleFacts:
    reason = f"moe_guard:{policy}/{name}"
    return RuleFacts(
        policy, name, mode, "high", action, phase, reason, "", on_error, ("rate",), (0.25,)
    )


@dataclass
class Row:
    """block: (position, rule); masks: numbers of mask actions; events: (rule, position, enforced), of
    which those in `exempt` were held back by an exception."""

    req_id: str
    prompt: int = 0
    output: int = 1
    block: tuple[int, int] | None = None
    masked_from: int = NEVER
    masks: Sequence[int] = ()
    unseen: int = 0
    judged: int = Judged.YES
    selections: int = 0
    extreme: float = float("nan")
    events: Sequence[tuple[int, int, bool]] = field(default_factory=tuple)
    exempt: Sequence[tuple[int, int, bool]] = ()


def report(
    *rows: Row, num_rules: int = 3, kept_events: int = 512, failures: dict[str, int] | None = None
) -> StepReport:
    """kept_events: so many have evidence in the report"""
    requests = np.zeros((len(rows), RequestColumn.NUM + 1), dtype=np.int64)
    masked = np.zeros((len(rows), 2), dtype=np.uint64)
    events = []
    for number, row in enumerate(rows):
        key = NEVER if row.block is None else row.block[0] * num_rules + row.block[1]
        requests[number] = [
            key, row.masked_from, row.prompt, row.output, row.unseen, row.judged, row.unseen,
            row.selections,
        ]  # fmt: skip
        for action in row.masks:
            masked[number, action // 64] |= np.uint64(1 << (action % 64))
        for rule_number, position, enforced in row.events:
            event = np.zeros(EventColumn.NUM, dtype=np.int64)
            event[EventColumn.REQUEST] = number
            event[EventColumn.RULE] = rule_number
            event[EventColumn.POSITION] = position
            event[EventColumn.IN_PROMPT] = position < 2
            event[EventColumn.ENFORCED] = enforced
            event[EventColumn.UNSEEN] = row.unseen
            event[EventColumn.EXEMPT] = (rule_number, position, enforced) in row.exempt
            events.append(event)
    events_V = np.array(events, dtype=np.int64).reshape(len(events), EventColumn.NUM)
    return StepReport(
        "rev-1",
        tuple(row.req_id for row in rows),
        requests,
        masked.view(np.int64),
        np.array([[row.extreme] * num_rules for row in rows], dtype=np.float32),
        events_V[:kept_events],
        np.full((len(events_V[:kept_events]), 1), 0.5),
        len(events),
        failures or {},
        more_events_V=events_V[kept_events:],
    )


def check(
    num_requests: int = 1,
    *,
    num_actions: int = 1,
    silent: Sequence[int] = (),
    findings: Sequence[tuple[int, int, int]] = (),
    violations: Sequence[tuple[int, int, int]] = (),
) -> RoutingCheck:
    """Of a model with MoE layers 3 and 5. silent: rows of layers, silent to every request; findings:
    (request, row of a layer, kind); violations: (request, row of a layer, action)."""
    made = RoutingCheck(
        layers=(3, 5),
        findings_LF=np.zeros((2, Finding.NUM), dtype=np.int64),
        silent_L=np.zeros(2, dtype=np.bool_),
        findings_BF=np.zeros((num_requests, Finding.NUM), dtype=np.int64),
        violations_L=np.zeros(2, dtype=np.int64),
        violations_BA=np.zeros((num_requests, num_actions), dtype=np.int64),
    )
    everyone = [(r, layer, Finding.MISSING) for layer in silent for r in range(num_requests)]
    made.silent_L[list(silent)] = True
    for request, layer, kind in [*everyone, *findings]:
        made.findings_LF[layer, kind] += 1
        made.findings_BF[request, kind] += 1
    for request, layer, action in violations:
        made.violations_L[layer] += 1
        made.violations_BA[request, action] += 1
    return made


def failed(*req_ids: str) -> StepReport:
    return StepReport.of_failed_step("rev-1", req_ids, {"evaluate": 1})


def decision(request_id: str = "cmpl-1", policy: str = "p") -> Decision:
    return Decision(
        decision_id="d-1",
        time="2026-01-02T03:04:05.678+00:00",
        revision="rev-1",
        policy=policy,
        rule="stop",
        mode="enforce",
        action="block",
        severity="high",
        request_id=request_id,
        phase="output",
        position=7,
        evidence=(EvidenceFacts("rate", 0.5, 0.25), EvidenceFacts("mass", None, 0.1)),
        unseen_tokens=0,
        outcome="blocked",
    )


HELLO = Hello(
    engine=0,
    revision="rev-1",
    policies=("p", "q"),
    rules=(
        rule("watch", policy="q", mode="audit", phase="prompt"),
        rule("steer", "mask"),
        rule("stop", "block", phase="output"),
    ),
    sets=(SetFacts("p", "flagged"), SetFacts("q", "odd")),
    masked_experts={"p": 4},
    blind_layers=0,
    live=True,
)


def everyone(req_ids: Sequence[str]) -> dict[str, int]:
    """Every request of a step counts."""
    return {req_id: row for row, req_id in enumerate(req_ids)}


def packed(made: StepReport, *, checked: bool = False) -> PackedReport:
    """As machine code reports a step in which nothing fired. checked: and the running check found
    nothing"""
    assert not made.num_events
    summary = StepSummary.of(made)
    flags = (
        (checked, PackedFlag.CHECKED),
        (summary.blocks, PackedFlag.BLOCKS),
        (summary.begins_masks, PackedFlag.BEGINS_MASKS),
        (summary.masks, PackedFlag.MASKS),
        (summary.is_all_seen, PackedFlag.ALL_SEEN),
    )
    parts = (summary.sums_F, made.requests_B, made.masked_BW, made.extremes_BC)
    data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    form = ReportForm(made.requests_B.shape[1], made.masked_BW.shape[1], made.extremes_BC.shape[1])
    data += bytes(-len(data) % 8)
    done = PackedReport(
        made.revision, made.req_ids, form, data, sum(flag for holds, flag in flags if holds)
    )
    if made.host is not None:
        done.begin_s, done.end_s, _ = made.host
    return done
