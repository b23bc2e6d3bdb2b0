"""What the guard costs, what it loses, and what it refuses."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from integrations.grafana.panels import Query, Row, graph, light, listing, number, sheet
from integrations.grafana.queries import POLICY, increase, of, rate, share, total


def health() -> dashboard.Dashboard:
    return sheet(
        "health",
        "MoE Guard: health",
        "The guard's own cost, faults, losses, reloads and masks.",
        [_live(), _cost(), _faults(), _policies(), _masks()],
    )


def _live() -> Row:
    return Row(
        "Live",
        [
            light(
                "Guards",
                "The guard of each engine.",
                Query(of("moe_guard_up"), "{{instance}} engine {{engine}}"),
                width=8,
            ),
            number(
                "Blind layers",
                "Of each engine.",
                Query(of("moe_guard_blind_layers"), "{{instance}} engine {{engine}}"),
                width=8,
                bad_above=1,
            ),
            number(
                "Series",
                "That the guard shows on each server. What its cap keeps out is below.",
                Query(
                    f'count by (instance) ({{__name__=~"moe_guard_.+", {of("")[1:-1]}}})',
                    "{{instance}}",
                ),
                width=8,
            ),
        ],
    )


def _cost() -> Row:
    steps = total(rate("moe_guard_steps_total"))
    seconds = "moe_guard_host_seconds_total"
    latency = share(
        total(rate("vllm:inter_token_latency_seconds_sum")),
        total(rate("vllm:inter_token_latency_seconds_count")),
    )
    return Row(
        "Cost",
        [
            graph(
                "Host time a step",
                "What the guard takes of each engine step on the host, by part.",
                Query(share(total(rate(seconds), "part"), steps, "on () group_left ()"), "{{part}}"),
                unit="s",
                stacked=True,
            ),
            graph(
                "Host time against inter-token latency",
                "The guard's host time a step, over vLLM's mean time between tokens.",
                Query(f"({share(total(rate(seconds)), steps)}) / ({latency})", "guard"),
                unit="percentunit",
            ),
            graph(
                "Steps",
                "Engine steps a second that the guard saw.",
                Query(
                    total(rate("moe_guard_steps_total"), "instance", "engine"),
                    "{{instance}} engine {{engine}}",
                ),
                unit="ops",
            ),
        ],
    )


def _faults() -> Row:
    return Row(
        "Faults and losses",
        [
            graph(
                "Faults",
                "Of the guard, by stage, a second. Requests that they met followed onError.",
                Query(total(rate("moe_guard_failures_total"), "stage"), "{{stage}}"),
                unit="ops",
            ),
            graph(
                "Events lost",
                "By stage, a second. What they tell of was done.",
                Query(total(rate("moe_guard_events_dropped_total"), "stage"), "{{stage}}"),
                unit="ops",
            ),
            graph(
                "Label combinations kept out",
                "By the cap on series, a second. Policies, sets or conditions lack metrics.",
                Query(total(rate("moe_guard_series_dropped_total"), "instance"), "{{instance}}"),
                unit="ops",
            ),
            graph(
                "Decision log",
                "Bytes a second.",
                Query(total(rate("moe_guard_log_bytes_total"), "instance"), "{{instance}}"),
                unit="Bps",
            ),
            graph(
                "Webhooks",
                "Deliveries a second, by how they ended.",
                Query(total(rate("moe_guard_webhooks_total"), "result"), "{{result}}"),
                unit="ops",
            ),
            graph(
                "Event subscribers",
                "Clients that read the stream of events.",
                Query(total(of("moe_guard_event_subscribers"), "instance"), "{{instance}}"),
            ),
        ],
    )


def _policies() -> Row:
    return Row(
        "Policies",
        [
            listing(
                "Revisions in force",
                "One row where all servers agree.",
                Query(
                    f"count by (model_name, revision, policies) ({of('moe_guard_program_info')} == 1)",
                    "Engines",
                ),
            ),
            graph(
                "Reloads in the time shown",
                "Sets that came into force, and sets that were refused or could not be read.",
                Query(
                    total(increase("moe_guard_reloads_total"), "instance", "result"),
                    "{{instance}}: {{result}}",
                ),
                width=12,
            ),
        ],
    )


def _masks() -> Row:
    chosen = 'policy=~"$policy|operator"'
    return Row(
        "Masks",
        [
            graph(
                "Masked requests",
                "Requests that a mask of the policy holds for now; `operator`: masks by hand.",
                Query(total(of("moe_guard_masked_requests", chosen), "policy"), "{{policy}}"),
                width=6,
            ),
            graph(
                "Masked experts",
                "Experts that masks of the policy name.",
                Query(f"max by (policy) ({of('moe_guard_masked_experts', chosen)})", "{{policy}}"),
                width=6,
            ),
            graph(
                "Operator masks",
                "Masks that an operator put in force by hand, on each server.",
                Query(total(of("moe_guard_operator_masks"), "instance"), "{{instance}}"),
                width=6,
            ),
            number(
                "Mask violations",
                "Masked experts seen at work since the start. Above 0: docs/alerts.md, "
                "MoeGuardMaskViolations.",
                Query(total(of("moe_guard_mask_violations_total", POLICY), "policy"), "{{policy}}"),
                width=6,
                bad_above=1,
            ),
        ],
    )
