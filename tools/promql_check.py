"""Asks a Prometheus every query that the rules and dashboards hold: does it parse, and give data?

    check(base_url, [*rule_queries(), *dashboard_queries()])

An alert is silent at rest, as it should be. So its comparisons are asked as `bool`, which gives 0 or 1
for each series that they compare: no data then means that the alert could never fire.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.prometheus import Prometheus, PromQLError

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "integrations" / "prometheus" / "moe-guard.rules.yaml"
DASHBOARDS = ROOT / "integrations" / "grafana" / "dashboards"

_VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "5m",
    "$model_name": ".*",
    "$instance": ".*",
    "$policy": ".*",
    "$severity": ".*",
}
_VARIABLE = re.compile(r"\$(?:__)?[a-z]\w*")
_LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)")
_COMPARISON = re.compile(r"""("[^"]*"|\{[^}]*\})|(==|!=|>=|<=|>|<)(?!=|\s*bool)""")
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Query:
    """where: the rule or panel that holds it, for people"""

    where: str
    expr: str


@dataclass(frozen=True, slots=True)
class Findings:
    """broken: what Prometheus said to each query that it refused. empty: queries that gave nothing."""

    broken: dict[str, str]
    empty: tuple[str, ...]


def rule_queries(path: Path = RULES) -> list[Query]:
    """The expression of each rule; those of alerts with their comparisons as `bool`."""
    return [
        Query(f"alert {rule['alert']}", as_bool(rule["expr"]))
        if "alert" in rule
        else Query(f"record {rule['record']}", rule["expr"])
        for group in yaml.safe_load(path.read_text("utf-8"))["groups"]
        for rule in group["rules"]
    ]


def dashboard_queries(folder: Path = DASHBOARDS) -> list[Query]:
    """Those of panels, annotations and variables, with every variable at All."""
    return [query for path in sorted(folder.glob("*.json")) for query in _of_dashboard(path)]


def _of_dashboard(path: Path) -> Iterator[Query]:
    board = json.loads(path.read_text("utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            where = f"{path.stem}, {panel['title']}, {target['refId']}"
            yield Query(where, substituted(target["expr"]))
    for annotation in board["annotations"]["list"]:
        yield Query(f"{path.stem}, annotation {annotation['name']}", substituted(annotation["expr"]))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = _LABEL_VALUES.fullmatch(variable["query"])
            if found is None:
                raise ValueError(f"{path.stem}: what does {variable['query']} ask for?")
            series, label = substituted(found["series"]), found["label"]
            yield Query(f"{path.stem}, variable {variable['name']}", f"group by ({label}) ({series})")


def substituted(expr: str) -> str:
    """As Grafana asks it. Raises ValueError for a variable that no dashboard has."""

    def value(match: re.Match[str]) -> str:
        if match[0] not in _VARIABLES:
            raise ValueError(f"{match[0]} is no variable: {expr}")
        return _VARIABLES[match[0]]

    return _VARIABLE.sub(value, expr)


def as_bool(expr: str) -> str:
    return _COMPARISON.sub(lambda match: match[1] or f"{match[2]} bool", expr)


def check(base_url: str, queries: Sequence[Query], *, patience_s: float = 0.0) -> Findings:
    """Ask them all; those that give nothing again, until they do or patience ends.

    A rate needs two scrapes, and a rule what it is made of, so a young Prometheus needs some seconds.
    """
    prometheus = Prometheus(base_url)
    deadline = time.monotonic() + patience_s
    broken: dict[str, str] = {}
    waiting = list(queries)
    while True:
        silent = []
        for query in waiting:
            try:
                if not prometheus.query(query.expr):
                    silent.append(query)
            except PromQLError as error:
                broken[query.where] = str(error)
        if not silent or time.monotonic() > deadline:
            return Findings(broken, tuple(query.where for query in silent))
        waiting = silent
        time.sleep(_POLL_S)


def faulty_rules(base_url: str) -> dict[str, Any]:
    """By name, the last error of each rule that Prometheus could not evaluate."""
    groups = Prometheus(base_url).get("rules", {})["groups"]
    return {
        rule["name"]: rule.get("lastError")
        for group in groups
        for rule in group["rules"]
        if rule["health"] == "err"
    }
