"""docs/metrics.md names every metric, with its labels, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.unit.events.test_metrics import moved

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
OF_ALL = {"model_name", "engine", "le"}


def test_the_page_has_each_metric_with_its_labels() -> None:
    shown: dict[str, set[str]] = {}
    for family in moved()[1].collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown[name] = {label for sample in family.samples for label in sample.labels} - OF_ALL
    rows = [line.split("|")[1:3] for line in PAGE.read_text(encoding="utf-8").splitlines()]
    words = [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows if len(row) == 2]
    page = {name: set(labels) for [[name], labels] in (row for row in words if len(row[0]) == 1)}
    assert page == shown
