"""What the dashboards are made of: panels of a few kinds, variables, and the sheet that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    text,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from integrations.grafana.queries import CHOSEN, SEVERITY, of

SOURCE = models.DataSourceRef("prometheus", "${datasource}")
TAG = "moe-guard"
_HEIGHT = 8


Panel = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel | text.Panel


@dataclass(frozen=True, slots=True)
class Query:
    """legend: as Grafana has it, with labels in double braces"""

    expr: str
    legend: str = ""

    def target(self, ref: str, kind: PromQueryFormat) -> prometheus.Dataquery:
        """A line of a graph or a row of a heatmap over time, a row of a table now."""
        built = prometheus.Dataquery().expr(self.expr).ref_id(ref).format(kind)
        if self.legend:
            built = built.legend_format(self.legend)
        return built.instant() if kind is PromQueryFormat.TABLE else built.range()


@dataclass(frozen=True, slots=True)
class Row:
    """repeat: a variable; the row is there once for each of its values"""

    title: str
    panels: Sequence[Panel]
    repeat: str | None = None


def _targets(queries: Sequence[Query], kind: PromQueryFormat) -> list[prometheus.Dataquery]:
    return [query.target(chr(ord("A") + number), kind) for number, query in enumerate(queries)]


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    stacked: bool = False,
) -> timeseries.Panel:
    """Lines over time."""
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
    )
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(_HEIGHT)
        .legend(legend)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .show_points(common_models.VisibilityMode.NEVER)
    )
    for target in _targets(queries, PromQueryFormat.TIME_SERIES):
        panel = panel.with_target(target)
    if stacked:
        stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
        panel = panel.stacking(stacking).fill_opacity(25)
    return panel


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str = "short",
    width: int = 4,
    bad_above: float | None = None,
) -> stat.Panel:
    """One figure, the latest; red above what is bad."""
    panel = _figure(title, description, query, width).unit(unit)
    steps = [models.Threshold(color="green")]
    if bad_above is not None:
        steps.append(models.Threshold(value=bad_above, color="red"))
    return panel.thresholds(_steps(steps))


def light(title: str, description: str, query: Query, *, width: int = 4) -> stat.Panel:
    """Green UP for 1, red DOWN for 0."""
    texts = {
        "1": models.ValueMappingResult(text="UP", color="green"),
        "0": models.ValueMappingResult(text="DOWN", color="red"),
    }
    steps = [models.Threshold(color="red"), models.Threshold(value=1, color="green")]
    return (
        _figure(title, description, query, width)
        .mappings([models.ValueMap(options=texts)])
        .thresholds(_steps(steps))
        .color_mode(common_models.BigValueColorMode.BACKGROUND)
    )


def _figure(title: str, description: str, query: Query, width: int) -> stat.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(_HEIGHT // 2)
        .reduce_options(reduce)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .with_target(query.target("A", PromQueryFormat.TIME_SERIES))
    )


def _steps(steps: list[models.Threshold]) -> dashboard.ThresholdsConfig:
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def listing(
    title: str,
    description: str,
    *queries: Query,
    width: int = 12,
    hidden: Sequence[str] = ("Time",),
) -> table.Panel:
    """A table of what is now; a column for each query, whose legend is its heading."""
    headings = {f"Value #{chr(ord('A') + n)}": query.legend for n, query in enumerate(queries)}
    if len(queries) == 1:
        headings["Value"] = queries[0].legend
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(_HEIGHT)
    )
    for target in _targets(queries, PromQueryFormat.TABLE):
        panel = panel.with_target(target)
    organise = {"excludeByName": dict.fromkeys(hidden, True), "renameByName": headings}
    return panel.with_transformation(
        models.DataTransformerConfig(id_val="merge", options={})
    ).with_transformation(models.DataTransformerConfig(id_val="organize", options=organise))


def histogram(title: str, description: str, expr: str, *, width: int = 8) -> heatmap.Panel:
    """A heatmap of a Prometheus histogram: time, bucket, how many."""
    query = Query(expr, "{{le}}")
    return _heatmap(title, description, width).with_target(query.target("A", PromQueryFormat.HEATMAP))


def layers(
    title: str, description: str, expr: str, *, width: int = 12, unit: str = "short"
) -> heatmap.Panel:
    """A heatmap with a row for each layer: time, layer, value."""
    rows = heatmap.RowsHeatmapOptions().layout(common_models.HeatmapCellLayout.UNKNOWN)
    return (
        _heatmap(title, description, width)
        .rows_frame(rows)
        .cell_values(heatmap.CellValues().unit(unit))
        .with_target(Query(expr, "{{layer}}").target("A", PromQueryFormat.TIME_SERIES))
    )


def _heatmap(title: str, description: str, width: int) -> heatmap.Panel:
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64)
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(_HEIGHT)
        .calculate(False)
        .color(colours.reverse(True))
    )


def note(title: str, markdown: str, *, width: int = 8) -> text.Panel:
    return (
        text.Panel().title(title).mode(TextMode.MARKDOWN).content(markdown).span(width).height(_HEIGHT)
    )


def variable(name: str, label: str, metric: str, *matchers: str) -> dashboard.QueryVariable:
    """The values that a label has, several of which may be chosen."""
    series = f"{metric}{{{', '.join(matchers)}}}" if matchers else metric
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({series}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def sheet(uid: str, title: str, description: str, rows: Sequence[Row]) -> dashboard.Dashboard:
    """A dashboard with the variables and annotations that all of them share."""
    decisions = "moe_guard_decisions_total"
    built = (
        dashboard.Dashboard(title)
        .uid(f"moe-guard-{uid}")
        .description(description)
        .tags([TAG])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("MoE Guard")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(variable("model_name", "Model", "moe_guard_up"))
        .with_variable(variable("instance", "Server", "moe_guard_up", 'model_name=~"$model_name"'))
        .with_variable(variable("severity", "Severity", decisions, CHOSEN))
        .with_variable(variable("policy", "Policy", decisions, CHOSEN, SEVERITY))
        .annotation(_operator_masks())
    )
    identity = 0
    for row in rows:
        identity += 1
        head = dashboard.Row(row.title).id(identity)
        built = built.with_row(head.repeat(row.repeat) if row.repeat else head)
        for panel in row.panels:
            identity += 1
            built = built.with_panel(panel.id(identity))
    return built


def _operator_masks() -> dashboard.AnnotationQuery:
    """Grafana marks the times at which the value is not 0."""
    return (
        dashboard.AnnotationQuery()
        .name("Operator masks")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("purple")
        .expr(f"sum by (model_name, instance) ({of('moe_guard_operator_masks')})")
    )
