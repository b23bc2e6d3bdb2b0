"""Golden prompts whose routing changed are noticed, in the layer where it did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from typer.testing import CliRunner

from guard.cli import app
from guard.discover.drift import compare, jensen_shannon
from guard.discover.errors import DiscoverError
from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing
from guard.trace.format import TracedRequest, TraceHeader
from guard.trace.writer import TraceWriter

LAYERS, EXPERTS, TOP_K = 3, 8, 2
TOPOLOGY = Topology("TinyForCausalLM", tuple(MoELayer(2 * n, EXPERTS, TOP_K) for n in range(LAYERS)))


def requests(seed: int = 0, count: int = 20, tokens: int = 30) -> list[TracedRequest]:
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        scores = generator.normal(size=(tokens + 4, LAYERS, EXPERTS))
        ids = np.argsort(-scores, axis=-1)[..., :TOP_K].astype(np.int32)
        weights = np.full(ids.shape, 0.5, np.float32)
        found.append(TracedRequest(Routing(ids, weights, tokens), request_id=f"{number}"))
    return found


def write(path: Path, traced: list[TracedRequest], topology: Topology = TOPOLOGY) -> Path:
    with TraceWriter(path, TraceHeader("tiny", topology)) as writer:
        for request in traced:
            writer.write(request)
    return path


def with_expert_0_of_layer_1_unused(traced: list[TracedRequest]) -> list[TracedRequest]:
    """As if its row of the router were damaged: expert 7 comes instead, or 6 where that is chosen."""
    changed = []
    for request in traced:
        ids = request.routing.topk_ids.copy()
        own = ids[:, 1]
        other = np.where((own == 7).any(axis=1), 6, 7)
        ids[:, 1] = np.where(own == 0, other[:, None], own)
        changed.append(replace(request, routing=request.routing._replace(topk_ids=ids)))
    return changed


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=12).filter(
        lambda pairs: any(one for one, _ in pairs) and any(other for _, other in pairs)
    )
)
def test_the_divergence_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, dtype=float).T
    assert jensen_shannon(one, other) == pytest.approx(jensenshannon(one, other) ** 2, abs=1e-9)


def test_the_same_routing_has_not_drifted(tmp_path: Path) -> None:
    drift = compare(write(tmp_path / "a", requests()), write(tmp_path / "b", requests()))
    assert [layer.layer for layer in drift.layers] == [0, 2, 4]
    assert [layer.divergence for layer in drift.layers] == [0.0, 0.0, 0.0]
    assert [layer.agreement for layer in drift.layers] == [1.0, 1.0, 1.0]
    assert (drift.prompts, drift.tokens) == (20, 600)
    assert drift.beyond(0.0) == []


def test_a_layer_that_routes_otherwise_is_named(tmp_path: Path) -> None:
    changed = with_expert_0_of_layer_1_unused(requests())
    drift = compare(write(tmp_path / "a", requests()), write(tmp_path / "b", changed))
    assert [layer.layer for layer in drift.beyond(0.01)] == [2]
    assert drift.layers[1].agreement == pytest.approx(7 / 8, abs=0.03)


def test_the_answers_tokens_do_not_count(tmp_path: Path) -> None:
    changed = []
    for request in requests():
        ids = request.routing.topk_ids.copy()
        ids[request.routing.num_prompt_tokens :] = [0, 1]
        changed.append(replace(request, routing=request.routing._replace(topk_ids=ids)))
    drift = compare(write(tmp_path / "a", requests()), write(tmp_path / "b", changed))
    assert drift.beyond(0.0) == []


def test_traces_of_other_prompts_or_models_are_refused(tmp_path: Path) -> None:
    golden = write(tmp_path / "golden", requests())
    fewer = write(tmp_path / "fewer", requests()[:-1])
    shorter = write(tmp_path / "shorter", requests(tokens=29))
    larger = Topology("TinyForCausalLM", tuple(MoELayer(n, EXPERTS, TOP_K) for n in range(LAYERS)))
    other = write(tmp_path / "other", requests(), larger)
    with pytest.raises(DiscoverError, match="has no prompt 19 of"):
        compare(golden, fewer)
    with pytest.raises(DiscoverError, match="has 29 tokens and had 30"):
        compare(golden, shorter)
    with pytest.raises(DiscoverError, match="it is another model"):
        compare(golden, other)


def test_the_command_exits_with_2_where_a_layer_drifted(tmp_path: Path) -> None:
    golden = write(tmp_path / "golden", requests())
    changed = write(tmp_path / "now", with_expert_0_of_layer_1_unused(requests()))
    same = CliRunner().invoke(app, ["verify", str(golden), "--golden", str(golden)])
    assert (same.exit_code, "beyond 0.01 in no layer" in same.stdout) == (0, True)
    drifted = CliRunner().invoke(app, ["verify", str(changed), "--golden", str(golden), "--json"])
    assert drifted.exit_code == 2
    assert [one["layer"] for one in json.loads(drifted.stdout)["layers"]] == [0, 2, 4]
    loose = ["verify", str(changed), "--golden", str(golden), "--limit", "0.5"]
    assert CliRunner().invoke(app, loose).exit_code == 0


def test_a_model_needs_its_prompts(tmp_path: Path) -> None:
    golden = write(tmp_path / "golden", requests())
    result = CliRunner().invoke(app, ["verify", "some/model", "--golden", str(golden)])
    assert result.exit_code == 1
    assert "--prompts" in result.stderr
