"""How the model routes, layer by layer, and how often flagged experts are chosen."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from integrations.grafana.panels import Query, Row, graph, layers, sheet
from integrations.grafana.queries import POLICY, by_layer, of, rate, share, total

_SELECTIONS = "moe_guard_expert_selections_total"
_WINDOW = "Over the last window of sampled steps."


def routing() -> dashboard.Dashboard:
    return sheet(
        "routing",
        "MoE Guard: routing",
        "How evenly layers use their experts, how far that is from the profile, and flagged experts.",
        [_heat(), _drift(), _sets()],
    )


def _heat() -> Row:
    return Row(
        "Layers",
        [
            layers(
                "Effective experts",
                f"1/Σp² of each layer: how many experts share the work. {_WINDOW}",
                by_layer("moe_guard_layer_effective_experts"),
            ),
            layers(
                "Entropy",
                f"In nats, of each layer. {_WINDOW}",
                by_layer("moe_guard_layer_entropy_nats"),
            ),
            layers(
                "Largest share",
                f"What the busiest expert of each layer takes. {_WINDOW}",
                by_layer("moe_guard_layer_max_share", "max"),
                unit="percentunit",
            ),
            layers(
                "Divergence from the profile",
                "Jensen-Shannon, in nats, 0 to ln 2. Only where a policy's profile has baselines. "
                "What comes behind a layer that drifts drifts as well: look at the first one.",
                by_layer("moe_guard_layer_divergence_nats", "max"),
            ),
        ],
    )


def _drift() -> Row:
    divergence = of("moe_guard_layer_divergence_nats")
    experts = of("moe_guard_layer_effective_experts")
    return Row(
        "Drift",
        [
            graph(
                "Layers furthest from the profile",
                "The five that diverge most, in nats. Other topics than the profile's are some 0.3.",
                Query(f"topk(5, max by (layer) ({divergence}))", "layer {{layer}}"),
            ),
            graph(
                "Layers against their own last day",
                "Effective experts now, over their average of a day: the least, the median, the most.",
                Query(f"min({experts} / avg_over_time({experts}[1d]))", "least"),
                Query(f"quantile(0.5, {experts} / avg_over_time({experts}[1d]))", "median"),
                Query(f"max({experts} / avg_over_time({experts}[1d]))", "most"),
            ).max_data_points(100),  # each point looks at a day
            graph(
                "Tokens behind these figures",
                "Tokens a second that the summaries of load are made of. Few make them noisy.",
                Query(total(rate("moe_guard_load_tokens_total"), "instance"), "{{instance}}"),
                unit="ops",
            ),
        ],
    )


def _sets() -> Row:
    tokens = total(rate("moe_guard_tokens_evaluated_total"))
    chosen = 'policy=~"$policy|operator"'
    return Row(
        "Flagged experts",
        [
            graph(
                "Selections of flagged sets",
                "How often an expert of the set is chosen, a second.",
                Query(total(rate(_SELECTIONS, chosen), "policy", "set"), "{{policy}}/{{set}}"),
                unit="ops",
            ),
            graph(
                "Selections per judged token",
                "The same, whatever the traffic.",
                Query(
                    share(
                        total(rate(_SELECTIONS, POLICY), "policy", "set"),
                        tokens,
                        "on () group_left ()",
                    ),
                    "{{policy}}/{{set}}",
                ),
            ),
            graph(
                "Selections of experts that an operator masks",
                "By mask. Under `reroute` there should be none.",
                Query(total(rate(_SELECTIONS, 'policy="operator"'), "set"), "{{set}}"),
                unit="ops",
            ),
        ],
    )
