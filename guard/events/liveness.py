"""Whether an engine's guard is live: proved at start, and checked while it serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from guard.events.message import Health, RuleFacts
from guard.failures import Stage
from guard.program.step_report import Finding, Judged, RequestColumn, RoutingCheck, StepReport

logger = logging.getLogger(__name__)

_FINDINGS: Mapping[int, str] = {
    Finding.MISSING: "rows without an expert",
    Finding.OUT_OF_RANGE: "ids that are no expert of the model",
    Finding.NOT_FINITE: "gate weights that are NaN or infinite",
    Finding.DUPLICATE: "an expert twice in a row",
}


class Liveness:
    """One engine's. What its start-up proof said, and what the running check has said since.

    A layer whose reports can be believed again is live again. A mask that was not obeyed stays broken
    until a restart: that it is not seen broken now says nothing about the next step.

    judges: the last step was judged
    blind: layers that were not seen as they are, as of the last check
    silent: some layer reports nothing, as of the last check
    violated: rules, by the reason that they give, whose masks were seen not to be obeyed
    """

    def __init__(self, engine: int = 0, *, live: bool = True, blind_layers: int = 0) -> None:
        """live, blind_layers: see `Hello`."""
        self._engine = engine
        self._proved = live
        self._proved_blind = blind_layers
        self.judges = True
        self.blind: frozenset[int] = frozenset()
        self.silent = False
        self.violated: frozenset[str] = frozenset()
        self._told: Health | None = self.health
        self._is_told = True  # nothing has changed since

    @property
    def health(self) -> Health:
        up = self._proved and self.judges and not self.blind and not self.violated
        return Health(self._engine, up, max(self._proved_blind, len(self.blind)))

    def take(self) -> Health | None:
        """What the API servers have to be told, if anything changed since the last call."""
        if self._is_told:
            return None
        health, self._is_told = self.health, True
        if health == self._told:
            return None
        self._told = health
        return health

    def put_back(self) -> None:
        """What `take` gave did not get out."""
        self._told, self._is_told = None, False

    def note(self, report: StepReport, masks: Sequence[RuleFacts] = ()) -> dict[str, int]:
        """Take a step's report. Returns the faults that its check found, by stage.

        masks: the rule of each mask action of the report's program
        """
        self._set_judges(not report.failed and not _ranks_differ(report))
        if report.check is None:
            return {}
        return self._note_check(report.check, masks)

    def note_sound(self) -> None:
        """A step was checked, and nothing was found."""
        self._note_blind(frozenset(), "")
        self.silent = False

    def note_fault(self) -> None:
        """A step of which not even a report could be taken."""
        self._set_judges(False)

    def _set_judges(self, judges: bool) -> None:
        self._is_told = self._is_told and judges == self.judges
        self.judges = judges

    def _note_blind(self, blind: frozenset[int], why: str) -> None:
        self._is_told = False
        if blind - self.blind:
            logger.error(
                "MoE Guard does not see MoE layers %s as they are (%s): moe_guard_up is 0, and "
                "requests follow onError. Restart the server; if that does not help, undo "
                "what was changed last: vLLM, its flags, another plugin",
                ", ".join(map(str, sorted(blind))),
                why,
            )
        elif self.blind and not blind:
            logger.warning("MoE Guard sees all MoE layers again")
        self.blind = blind

    def _note_check(self, check: RoutingCheck, masks: Sequence[RuleFacts]) -> dict[str, int]:
        numbers = np.array(check.layers, dtype=np.int64)
        self.silent = bool(check.silent_L.any())
        blind = frozenset(numbers[check.findings_LF.any(axis=1)].tolist())
        self._note_blind(blind, _described(check))

        rules = [masks[action] for action in np.flatnonzero(check.violations_BA.any(axis=0)).tolist()]
        violated = frozenset(rule.reason for rule in rules)
        if violated - self.violated:
            layers = numbers[check.violations_L > 0].tolist()
            policies = sorted({rule.policy for rule in rules})
            logger.error(
                "Masked experts are at work in MoE layers %s, against the masks of %s: moe_guard_up is "
                "0 until the server is restarted, and requests under these masks follow onError",
                ", ".join(map(str, layers)),
                ", ".join(policies),
            )
        self.violated |= violated
        return {Stage.ROUTING: 1} if blind else {}


def _ranks_differ(report: StepReport) -> bool:
    """On every request."""
    if report.summary is not None and report.summary.is_all_seen:
        return False
    judged_B = report.requests_B[:, RequestColumn.JUDGED]
    return len(judged_B) > 0 and bool((judged_B == Judged.RANKS_DIFFER).all())


def _described(check: RoutingCheck) -> str:
    if check.silent_L.any():
        silent = [str(layer) for layer, mute in zip(check.layers, check.silent_L, strict=True) if mute]
        return f"layers {', '.join(silent)} report nothing"
    return ", ".join(words for kind, words in _FINDINGS.items() if check.findings_LF[:, kind].any())
