"""What the guard counted is what vLLM's own record of routing holds, selection by selection."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.integration.offline.engines import Engines
from tests.integration.offline.reading import counted_selections, decisions, rows, selections

pytestmark = pytest.mark.vllm


def _record(output: dict[str, Any]) -> list[Any]:
    record: list[Any] = output["samples"][0]["routed_experts"]
    return record


@pytest.mark.parametrize("name", ["unmasked", "masked"])
def test_rows_at_the_tap_are_the_rows_of_vllms_record(engines: Engines, name: str) -> None:
    case = engines.case("v2-guarded", "main", name)
    for output in case["batches"][0]:
        judged = rows(case, output)
        assert [row[0] for row in judged] == list(range(len(judged)))
        assert [row[1] for row in judged] == _record(output)


@pytest.mark.parametrize("name", ["unmasked", "masked"])
def test_counters_are_the_sums_of_vllms_record(engines: Engines, name: str) -> None:
    case = engines.case("v2-guarded", "main", name)
    recorded = selections([0, ids] for output in case["batches"][0] for ids in _record(output))
    assert counted_selections(case) == recorded


def test_a_blocked_request_has_one_row_more_than_vllms_record_the_one_that_fired(
    engines: Engines,
) -> None:
    case = engines.case("v2-guarded", "main", "blocks")
    seen = Counter[tuple[int, int]]()
    for [output] in case["batches"]:
        if len(output["samples"]) > 1:
            continue
        [fired] = decisions(case, output, "stop")
        judged, record = rows(case, output), _record(output)
        assert [row[1] for row in judged[:-1]] == record
        assert judged[-1][0] == fired["position"] == len(record)
    for judged in case["rows"].values():
        seen += selections(judged)
    assert counted_selections(case) == seen
