"""Decisions as a webhook tells them: what Alertmanager sends, so that its receivers understand it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from guard.events.message import Decision, EvidenceFacts

ALERT_NAME: Final = "MoeGuardPolicyFired"
MAX_ALERTS: Final = 100
"""Decisions in one notification; how many more there were is in `truncatedAlerts`."""

_FOREVER: Final = "0001-01-01T00:00:00Z"
"""What Alertmanager gives for an end that is not known."""


def by_rule(decisions: Iterable[Decision]) -> list[list[Decision]]:
    """A group for each rule, in the order in which they fired."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((decision.policy, decision.rule), []).append(decision)
    return list(groups.values())


def notification(group: Sequence[Decision]) -> dict[str, Any]:
    """Of decisions of one rule. No routing, prompt or output is in it: a decision has none."""
    alerts = [_alert(decision) for decision in group[:MAX_ALERTS]]
    own = {"alertname": ALERT_NAME, "policy": group[0].policy, "rule": group[0].rule}
    return {
        "version": "4",
        "groupKey": "{}:{" + ", ".join(f'{name}="{value}"' for name, value in own.items()) + "}",
        "truncatedAlerts": max(len(group) - MAX_ALERTS, 0),
        "status": "firing",
        "receiver": "moe-guard",
        "groupLabels": own,
        "commonLabels": _common([alert["labels"] for alert in alerts]),
        "commonAnnotations": _common([alert["annotations"] for alert in alerts]),
        "externalURL": "",
        "alerts": alerts,
    }


def _alert(decision: Decision) -> dict[str, Any]:
    labels = {
        "alertname": ALERT_NAME,
        "policy": decision.policy,
        "rule": decision.rule,
        "severity": decision.severity,
        "mode": decision.mode,
        "action": decision.action,
        "outcome": decision.outcome,
        "phase": decision.phase,
        "model_name": decision.model,
    }
    return {
        "status": "firing",
        "labels": labels,
        "annotations": {
            "summary": f"Policy {decision.policy}, rule {decision.rule}: a request was "
            f"{decision.outcome} ({decision.mode})",
            "description": _evidence(decision.evidence),
            "decision_id": decision.decision_id,
            "request_id": decision.request_id,
            "revision": decision.revision,
        },
        "startsAt": decision.time,
        "endsAt": _FOREVER,
        "generatorURL": "",
        # Of a decision, so that receivers know one that comes again and keep apart two that differ.
        "fingerprint": hashlib.sha256(decision.decision_id.encode()).hexdigest()[:16],
    }


def _evidence(evidence: Sequence[EvidenceFacts]) -> str:
    return "; ".join(
        f"{one.condition} {'unknown' if one.value is None else f'{one.value:g}'}, "
        f"threshold {one.threshold:g}"
        for one in evidence
    )


def _common(mappings: Sequence[dict[str, str]]) -> dict[str, str]:
    first, *rest = mappings
    return {
        key: value for key, value in first.items() if all(other.get(key) == value for other in rest)
    }
