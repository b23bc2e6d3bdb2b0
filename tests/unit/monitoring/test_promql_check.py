"""What the checker of queries makes of an expression before it asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.promql_check import as_bool, dashboard_queries, substituted


@pytest.mark.parametrize(
    ("expr", "asked"),
    [
        ("up == 0", "up == bool 0"),
        ("a > 3 * b and c <= bool 2", "a > bool 3 * b and c <= bool 2"),
        ('a{b!="c", d=~"e>f"} >= 1', 'a{b!="c", d=~"e>f"} >= bool 1'),
        ('label_replace(a, "b", "x > y", "c", ".*") != 2', None),
        ("absent(a)", "absent(a)"),
    ],
)
def test_comparisons_give_0_or_1(expr: str, asked: str | None) -> None:
    assert as_bool(expr) == (asked or expr.replace("!= 2", "!= bool 2"))


def test_variables_are_those_of_the_dashboards() -> None:
    expr = 'rate(a{model_name=~"$model_name", policy=~"$policy|operator"}[$__rate_interval])'
    assert substituted(expr) == 'rate(a{model_name=~".*", policy=~".*|operator"}[1m])'
    assert substituted('label_replace(a, "b", "0$1", "c", "(.)")').count("$1") == 1
    with pytest.raises(ValueError, match=r"\$tenant is no variable"):
        substituted('a{tenant="$tenant"}')


def test_queries_of_panels_annotations_and_variables_are_found(tmp_path: Path) -> None:
    board = {
        "panels": [
            {"title": "row", "type": "row"},
            {"title": "p", "targets": [{"refId": "A", "expr": "a"}, {"refId": "B", "expr": "b"}]},
        ],
        "annotations": {"list": [{"name": "n", "expr": "c"}]},
        "templating": {
            "list": [
                {"type": "datasource", "name": "datasource"},
                {"type": "query", "name": "v", "query": "label_values(d{e=~\"$policy\"}, v)"},
            ]
        },
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(board))

    assert [(query.where, query.expr) for query in dashboard_queries(tmp_path)] == [
        ("x, p, A", "a"),
        ("x, p, B", "b"),
        ("x, annotation n", "c"),
        ("x, variable v", 'group by (v) (d{e=~".*"})'),
    ]
