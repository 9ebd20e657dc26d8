"""What the dashboards are put together from: panels of a few kinds that look alike everywhere, and the variables. Knows
no metric and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import common as shared
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "$__rate_interval"

Panel = timeseries.Panel | heatmap.Panel | stat.Panel | statetimeline.Panel


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how its series are called."""

    expr: str
    legend: str = ""

    def target(self, ref: str) -> prometheus.Dataquery:
        return prometheus.Dataquery().expr(self.expr).legend_format(self.legend or "__auto").range().ref_id(ref)


def _targets(queries: tuple[Query, ...]) -> list[prometheus.Dataquery]:
    return [query.target(chr(ord("A") + index)) for index, query in enumerate(queries)]


def lines(title: str, what: str, *queries: Query, unit: str = "short", stacked: bool = False, span: int = 12) -> Panel:
    """Lines over time, from zero."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(span)
        .height(8)
        .line_width(1)
        .fill_opacity(40 if stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            shared.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(shared.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    )
    if stacked:
        panel = panel.stacking(shared.StackingConfig().mode(common.StackingMode.NORMAL))
    for target in _targets(queries):
        panel = panel.with_target(target)
    return panel


def number(title: str, what: str, query: Query, *, unit: str = "short", bad_above: float | None = None) -> Panel:
    """One figure with its recent course; red above `bad_above`."""
    steps = [model.Threshold(value=None, color="green")]
    if bad_above is not None:
        steps.append(model.Threshold(value=bad_above, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .unit(unit)
        .span(4)
        .height(4)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(query.target("A"))
    )


def rows(title: str, what: str, query: Query, *, unit: str = "short", buckets: bool = False, span: int = 12) -> Panel:
    """A heat map with one row for each series, or for each bucket of a histogram."""
    target = query.target("A")
    if buckets:
        target = target.format(PromQueryFormat.HEATMAP)
    return (
        heatmap.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .span(span)
        .height(10)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .steps(64)
            .exponent(0.5)
            .scale(heat.HeatmapColorScale.EXPONENTIAL)
            .fill("dark-orange")
            .reverse(False)
        )
        .cell_values(heatmap.CellValues().unit(unit))
        .show_value(common.VisibilityMode.NEVER)
        .with_target(target)
    )


def states(title: str, what: str, query: Query, *, span: int = 12) -> Panel:
    """0 and 1 of each series as a coloured bar over time."""
    no, yes = model.ValueMappingResult(text="no", color="red"), model.ValueMappingResult(text="yes", color="green")
    return (
        statetimeline.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .span(span)
        .height(10)
        .mappings([model.ValueMap(options={"0": no, "1": yes})])
        .merge_values(True)
        .show_value(common.VisibilityMode.NEVER)
        .with_target(query.target("A"))
    )


def variable(name: str, label: str, query: str, *, several: bool = True) -> dashboard.QueryVariable:
    """A choice of label values."""
    found = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )
    return found.multi(True).include_all(True) if several else found


def page(uid: str, title: str, what: str, variables: list[dashboard.QueryVariable]) -> dashboard.Dashboard:
    """An empty dashboard; the others are linked at its top."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(what)
        .tags(["shardq"])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("shardq")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["shardq"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for choice in variables:
        made = made.with_variable(choice)
    return made
