"""Is it live, what did it do, and how does vLLM fare beside it?"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from integrations.grafana.panels import Query, Row, graph, light, listing, number, sheet
from integrations.grafana.queries import POLICY, SEVERITY, increase, of, quantile, rate, share, total

_REQUESTS = "moe_guard_requests_total"
_DECISIONS = "moe_guard_decisions_total"


def overview() -> dashboard.Dashboard:
    return sheet(
        "overview",
        "MoE Guard: overview",
        "Whether the guard is live, what it decided, and vLLM's latency and throughput beside it.",
        [_live(), _decisions(), _requests(), _vllm()],
    )


def _live() -> Row:
    requests = total(rate(_REQUESTS))
    return Row(
        "Live",
        [
            light(
                "Guard",
                "UP while every chosen server's guard sees all MoE layers and its masks hold. "
                "DOWN: docs/alerts.md, MoeGuardDown.",
                Query(f"min({of('moe_guard_up')})"),
            ),
            number(
                "Blind layers",
                "MoE layers that do not report their routing, over all chosen servers.",
                Query(f"sum({of('moe_guard_blind_layers')})"),
                bad_above=1,
            ),
            number("Requests a second", "Engine requests that end.", Query(requests), unit="reqps"),
            number(
                "Blocked",
                "The share of requests that the guard ended.",
                Query(share(total(rate(_REQUESTS, 'outcome="blocked"')), requests)),
                unit="percentunit",
            ),
            number(
                "Unjudged",
                "The share of requests that passed because a policy failed open.",
                Query(share(total(rate(_REQUESTS, 'outcome="unjudged"')), requests)),
                unit="percentunit",
                bad_above=0.001,
            ),
            number(
                "Operator masks",
                "Masks that an operator put in force by hand.",
                Query(f"sum({of('moe_guard_operator_masks')})"),
            ),
        ],
    )


def _decisions() -> Row:
    chosen = (POLICY, SEVERITY)
    return Row(
        "Decisions",
        [
            graph(
                "Decisions by policy and action",
                "Rules that fire, a second. In audit the action is withheld.",
                Query(
                    total(rate(_DECISIONS, *chosen), "policy", "action", "mode"),
                    "{{policy}}: {{action}} ({{mode}})",
                ),
                unit="ops",
            ),
            graph(
                "Decisions by severity",
                "Rules that fire, a second, by the severity of their policy.",
                Query(total(rate(_DECISIONS, *chosen), "severity"), "{{severity}}"),
                unit="ops",
                stacked=True,
            ),
            listing(
                "Decisions in the time shown",
                "The decision log has the request and the evidence of each.",
                Query(
                    total(
                        increase(_DECISIONS, *chosen), "policy", "rule", "action", "mode", "severity"
                    ),
                    "Decisions",
                ),
                width=8,
            ),
        ],
    )


def _requests() -> Row:
    return Row(
        "Requests",
        [
            graph(
                "Outcomes",
                "Engine requests that end, a second, by the most that happened to each.",
                Query(total(rate(_REQUESTS), "outcome"), "{{outcome}}"),
                unit="reqps",
                stacked=True,
                width=12,
            ),
            graph(
                "Shares of outcomes that are not `passed`",
                "Of all requests that end. Unjudged ones passed because a policy failed open.",
                Query(
                    share(
                        total(rate(_REQUESTS, 'outcome!="passed"'), "outcome"),
                        total(rate(_REQUESTS)),
                        "ignoring (outcome) group_left ()",
                    ),
                    "{{outcome}}",
                ),
                unit="percentunit",
                width=12,
            ),
        ],
    )


def _vllm() -> Row:
    def quantiles(metric: str) -> list[Query]:
        return [Query(quantile(q, metric), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)]

    return Row(
        "vLLM beside it",
        [
            graph(
                "Tokens",
                "vLLM's tokens a second, and those whose routing the guard judged.",
                Query(total(rate("vllm:prompt_tokens_total")), "vLLM: prompt"),
                Query(total(rate("vllm:generation_tokens_total")), "vLLM: output"),
                Query(total(rate("moe_guard_tokens_evaluated_total"), "phase"), "judged: {{phase}}"),
            ),
            graph(
                "Time to the first token",
                "vLLM's own measure, the guard included.",
                *quantiles("vllm:time_to_first_token_seconds"),
                unit="s",
            ),
            graph(
                "Inter-token latency",
                "vLLM's own measure, the guard included.",
                *quantiles("vllm:inter_token_latency_seconds"),
                unit="s",
            ),
            graph(
                "Whole requests",
                "vLLM's end-to-end latency. Blocked requests end early and shorten it.",
                *quantiles("vllm:e2e_request_latency_seconds"),
                unit="s",
            ),
            graph(
                "Requests in vLLM",
                "Running, waiting, and those under a mask.",
                Query(total(of("vllm:num_requests_running")), "running"),
                Query(total(of("vllm:num_requests_waiting")), "waiting"),
                Query(total(of("moe_guard_masked_requests")), "masked, each policy's counted"),
            ),
            graph(
                "Finished requests",
                "vLLM's finish reasons, a second, and the guard's blocks, which vLLM counts as stops.",
                Query(
                    total(rate("vllm:request_success_total"), "finished_reason"), "{{finished_reason}}"
                ),
                Query(total(rate(_REQUESTS, 'outcome="blocked"')), "blocked by the guard"),
                unit="reqps",
            ),
        ],
    )
