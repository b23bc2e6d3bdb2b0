"""The rules before Prometheus's own checker, and what an alert has to say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from guard.failures import Stage
from tests.support.synthetic_metrics import BusyServer
from tools.prometheus import promtool
from tools.promql_check import ROOT, RULES

TESTS = RULES.with_name("moe-guard.rules.test.yaml")
GROUPS = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule
}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", RULES)

    assert done.returncode == 0, done.stdout + done.stderr


def test_their_unit_tests_pass() -> None:
    done = promtool("test", "rules", TESTS)

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_is_wrong_fails_its_unit_tests(tmp_path: Path) -> None:
    tests = yaml.safe_load(TESTS.read_text("utf-8"))
    tests["tests"] = [test for test in tests["tests"] if test["name"] == "Down and blind"]
    (tmp_path / TESTS.name).write_text(yaml.safe_dump(tests))
    wrong = RULES.read_text("utf-8").replace("moe_guard_up == 0", "moe_guard_up == 2")
    (tmp_path / RULES.name).write_text(wrong)

    done = promtool("test", "rules", tmp_path / TESTS.name)

    assert done.returncode != 0
    assert "MoeGuardDown" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_what_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    annotations = alert["annotations"]

    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert annotations["summary"]
    assert annotations["description"].endswith(".")
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors(ROOT / page)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_fires_in_one_unit_test_and_is_silent_in_another(name: str) -> None:
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text("utf-8"))["tests"]
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == name
    ]

    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


def test_every_stage_is_explained() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text("utf-8")
    _, _, table = page.partition("| stage | what was going on |")

    named = set(re.findall(r"`(\w+)`", table.partition("###")[0]))

    assert named == {str(stage) for stage in Stage}


def test_names_follow_prometheus_habits() -> None:
    registry = CollectorRegistry()
    BusyServer(registry)
    text = generate_latest(registry).decode()
    shown = [line for line in text.splitlines() if "moe_guard_" in line and "_created" not in line]

    done = promtool("check", "metrics", stdin="\n".join(shown) + "\n")

    assert done.returncode == 0, done.stdout + done.stderr
