"""What a policy measures, how close that comes to its thresholds, and what was withheld."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from integrations.grafana.panels import Query, Row, graph, histogram, listing, note, sheet
from integrations.grafana.queries import POLICY, SEVERITY, increase, of, quantile, rate, share, total

_DECISIONS = "moe_guard_decisions_total"
_CONDITION = ("policy", "rule", "condition")

_EVIDENCE = """\
Metrics hold no request. The evidence of one decision is in the **decision log** (`--decision-log`), one
JSON object a line: values and thresholds of all conditions (`evidence`), tokens that nobody saw
(`unseen_tokens`), whether an exception held the action back (`exempt`), and the `revision`.

    jq 'select(.policy == "NAME" and .exempt)' decisions.jsonl
"""


def policy() -> dashboard.Dashboard:
    return sheet(
        "policy",
        "MoE Guard: policies",
        "Signals against their thresholds, evidence and exceptions, policy by policy.",
        [_all(), _each()],
    )


def _all() -> Row:
    enforced = of(_DECISIONS, POLICY, SEVERITY, 'mode="enforce"')
    withheld = rate(_DECISIONS, POLICY, SEVERITY, 'mode="audit"', 'action!="observe"')
    return Row(
        "All chosen policies",
        [
            listing(
                "Conditions",
                "The threshold, and what requests reached in the time shown: each counts once, with "
                "its value nearest to the threshold, or furthest beyond it. A condition without values "
                "judged nobody.",
                Query(
                    f"max by ({', '.join(_CONDITION)}) ({of('moe_guard_signal_threshold', POLICY)})",
                    "Threshold",
                ),
                Query(_reached(0.5), "Half reach"),
                Query(_reached(0.99), "1 % exceed"),
                Query(total(increase("moe_guard_signal_value_count", POLICY), *_CONDITION), "Requests"),
                width=24,
            ),
            graph(
                "Decisions by rule",
                "Rules that fire, a second.",
                Query(
                    total(rate(_DECISIONS, POLICY, SEVERITY), "policy", "rule", "mode", "phase"),
                    "{{policy}}/{{rule}} ({{mode}}, {{phase}})",
                ),
                unit="ops",
            ),
            graph(
                "Exceptions: actions withheld from rules in enforce",
                "Decisions in audit of rules that also enforce: an exception held the action back for "
                "these requests, or a request asked a policy in audit to enforce for itself.",
                Query(
                    f"{total(withheld, 'policy', 'rule', 'action')} and on (policy, rule) {enforced}",
                    "{{policy}}/{{rule}}: {{action}}",
                ),
                unit="ops",
            ),
            note("Evidence", _EVIDENCE),
        ],
    )


def _each() -> Row:
    chosen = (POLICY,)
    return Row(
        "Policy $policy",
        [
            histogram(
                "Signals of $policy",
                "How many requests reached which value. Mass close to the threshold asks for a better "
                "one.",
                total(
                    f"increase({of('moe_guard_signal_value_bucket', *chosen)}[$__rate_interval])", "le"
                ),
            ),
            graph(
                "Signals against thresholds of $policy",
                "What half, 5 % and 1 % of the requests exceed, and the threshold.",
                *(
                    Query(
                        quantile(q, "moe_guard_signal_value", "rule", "condition", matchers=chosen),
                        f"{{{{rule}}}}/{{{{condition}}}}: p{q * 100:g}",
                    )
                    for q in (0.5, 0.95, 0.99)
                ),
                Query(
                    f"max by (rule, condition) ({of('moe_guard_signal_threshold', *chosen)})",
                    "{{rule}}/{{condition}}: threshold",
                ),
            ),
            graph(
                "Decisions of $policy per 1,000 judged requests",
                "Rules that fire, against requests that any condition of the policy measured.",
                Query(
                    "1000 * "
                    + share(
                        total(rate(_DECISIONS, *chosen), "rule", "mode"),
                        total(rate("moe_guard_signal_value_count", *chosen), "rule"),
                        "ignoring (mode) group_left ()",
                    ),
                    "{{rule}} ({{mode}})",
                ),
            ),
        ],
        repeat="policy",
    )


def _reached(q: float) -> str:
    buckets = total(increase("moe_guard_signal_value_bucket", POLICY), "le", *_CONDITION)
    return f"histogram_quantile({q:g}, {buckets})"
