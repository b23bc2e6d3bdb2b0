"""Reads the results of `tests.support.engine_run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.integration.offline.policies import FLAGGED, expert_set
from tests.support.tiny_models import NUM_EXPERTS, NUM_LAYERS

Case = dict[str, Any]
Row = list[Any]
Position = int


def samples(case: Case) -> list[dict[str, Any]]:
    """Every sample of every request, in order."""
    return [sample for batch in case["batches"] for out in batch for sample in out["samples"]]


def text(sample: dict[str, Any]) -> tuple[list[int], list[dict[str, str]]]:
    """Token ids and, to the last bit, log probabilities."""
    return sample["tokens"], sample["logprobs"]


def texts(case: Case) -> list[tuple[list[int], list[dict[str, str]]]]:
    return [text(sample) for sample in samples(case)]


def decisions(
    case: Case, output: dict[str, Any], policy: str, rule: str | None = None
) -> list[dict[str, Any]]:
    return [
        decision
        for decision in case["decisions"]
        if decision["request_id"] == output["request_id"]
        and decision["policy"] == policy
        and rule in (None, decision["rule"])
    ]


def facts(case: Case) -> list[list[Any]]:
    """By request, in order: what was decided where, on what evidence and with what outcome."""
    return [
        [
            (d["policy"], d["rule"], d["mode"], d["position"], d["evidence"], d["outcome"])
            for d in case["decisions"]
            if d["request_id"] == output["request_id"]
        ]
        for batch in case["batches"]
        for output in batch
    ]


def rows(case: Case, output: dict[str, Any]) -> list[Row]:
    """[position, [layers, top_k] ids] of each row of a request that the guard judged, n == 1."""
    number = output["request_id"]
    found: list[list[Row]] = [
        rows for req_id, rows in case["rows"].items() if req_id.rpartition("-")[0] == number
    ]
    assert len(found) == 1, f"{len(found)} recorded requests have the id {number}"
    return found[0]


def selections(some_rows: Iterable[Row]) -> Counter[tuple[int, int]]:
    """How often each (layer, expert) was chosen."""
    return Counter(
        (layer, expert)
        for _, ids_LK in some_rows
        for layer, ids_K in enumerate(ids_LK)
        for expert in ids_K
    )


def flagged(some_rows: Iterable[Row]) -> int:
    """Selections of the experts that masks take out."""
    return sum(n for (_, expert), n in selections(some_rows).items() if expert in FLAGGED)


def counter(case: Case, name: str, **labels: str) -> float:
    """What the guard's counter `name` moved by, summed over the labels that are not given."""
    total = 0.0
    for series, value in case["counters"].items():
        series_name, _, rest = series.removesuffix("}").partition("{")
        own = dict(label.split("=", 1) for label in rest.split(",") if label)
        if series_name == name and labels.items() <= own.items():
            total += value
    return total


def counted_selections(case: Case) -> Counter[tuple[int, int]]:
    """How often each (layer, expert) was chosen, by the policy that has a set for each."""
    counts = {
        (layer, expert): int(
            counter(
                case,
                "expert_selections_total",
                policy="every-expert",
                set=expert_set(layer, expert),
            )
        )
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    }
    return +Counter(counts)
