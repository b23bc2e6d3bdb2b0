"""The dashboards are what their code makes, stand on the grid, and ask for metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry

from integrations.grafana import build
from tests.support.synthetic_metrics import BusyServer
from tools.promql_check import ROOT, RULES, dashboard_queries, rule_queries

BOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8")) for path in sorted(build.FOLDER.glob("*.json"))
}
PROVISIONING = ROOT / "integrations" / "grafana" / "provisioning"
QUERIES = [*rule_queries(), *dashboard_queries()]


def names(pattern: str) -> set[str]:
    return {name for query in QUERIES for name in re.findall(pattern, query.expr)}


def test_the_files_are_up_to_date() -> None:
    assert build.stale() == [], "run: python -m integrations.grafana.build"


def test_a_file_that_is_not_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "old.json").write_text("{}")

    with pytest.raises(SystemExit, match=r"stale: moe-guard-health\.json, .*old\.json"):
        build.main(["--check"])

    (tmp_path / "old.json").unlink()
    build.main([])
    assert build.stale() == []
    build.main(["--check"])


def test_there_are_four() -> None:
    assert set(BOARDS) == {f"moe-guard-{name}" for name in ("overview", "policy", "routing", "health")}


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_one_to_grafanas_own_types(name: str) -> None:
    register_default_plugins()

    read = Dashboard.from_json(BOARDS[name])

    assert json.loads(JSONEncoder().encode(read)) == BOARDS[name]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_ids_and_words_and_do_not_lie_on_one_another(name: str) -> None:
    panels = BOARDS[name]["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        assert panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] not in {"row", "text"}:
            assert panel["description"].endswith((".", "MoeGuardDown.", "MoeGuardMaskViolations."))
            assert panel["datasource"]["uid"] == "${datasource}"
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


@pytest.mark.parametrize("name", BOARDS)
def test_variables_and_the_operators_masks_are_on_every_dashboard(name: str) -> None:
    variables = [variable["name"] for variable in BOARDS[name]["templating"]["list"]]
    (annotation,) = BOARDS[name]["annotations"]["list"]

    assert variables == ["datasource", "model_name", "instance", "severity", "policy"]
    assert "moe_guard_operator_masks" in annotation["expr"]


def test_every_metric_of_the_guard_is_asked_for_and_exists() -> None:
    registry = CollectorRegistry()
    BusyServer(registry)
    exposed = {
        sample.name
        for family in registry.collect()
        for sample in family.samples
        if sample.name.startswith("moe_guard_") and not sample.name.endswith("_created")
    }

    asked = names(r"(?<![:\w])moe_guard_\w+") - {"moe_guard_"}

    assert asked <= exposed
    assert {name for name in exposed - asked if not name.endswith(("_sum", "_bucket"))} == set()


def test_every_metric_of_the_guard_is_explained() -> None:
    registry = CollectorRegistry()
    BusyServer(registry)
    shown = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in registry.collect()
        if family.name.startswith("moe_guard_")
    }
    page = (ROOT / "docs" / "alerts.md").read_text("utf-8")

    explained = set(re.findall(r"^### (moe_guard_\w+)$", page, re.MULTILINE))

    assert explained == shown


def test_vllms_metrics_are_those_of_the_installed_version() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py"
    theirs = set(re.findall(r'name="(vllm:\w+)"', source.read_text("utf-8")))

    asked = names(r"(?<![\w])vllm:\w+")

    assert len(asked) >= 8
    assert {re.sub(r"_(total|sum|count|bucket)$", "", name) for name in asked} <= theirs


def test_recorded_series_that_rules_ask_for_are_recorded() -> None:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}

    assert names(r"\b\w+:moe_guard_\w+:\w+") <= recorded


def test_what_grafana_is_provisioned_with_fits_the_dashboards() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "moe-guard.yaml").read_text())[
        "providers"
    ]

    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert provider["type"] == "file"
    assert provider["options"]["path"] == "/etc/moe-guard/dashboards"
