"""Others' lists of experts, from files that may hold anything."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.discover.errors import DiscoverError
from guard.discover.frames import _cell, read_frame
from guard.discover.importers import FORMATS, as_profile_sets, import_sets

FRAME = Path(__file__).parent / "data" / "steermoe_like.pkl"
"""Of pandas 2.3; made by `make_frame.py` beside it."""


def write(folder: Path, content: object) -> Path:
    path = folder / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_pickled_table_is_read_without_pandas() -> None:
    frame = read_frame(FRAME.read_bytes())
    assert set(frame) == {"layer", "expert", "a1", "d1", "a1_n", "a2_n", "risk_diff", "task"}
    assert frame["layer"] == [12, 12, 3]
    assert frame["expert"] == [85, 4, 7]
    assert frame["a1"] == [48824, 10, 500]
    assert frame["risk_diff"] == pytest.approx([0.7266, -0.4, 0.1])
    assert frame["task"] == ["safety"] * 3


def test_experts_of_a_table_are_those_with_a_large_risk_difference() -> None:
    found = import_sets(FRAME, "steermoe")
    assert as_profile_sets(found.sets) == {
        "raised": [{"layer": 12, "experts": [85]}],
        "lowered": [{"layer": 12, "experts": [4]}],
    }
    assert "pooled tokens" in found.note


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/moe-guard-was-run"),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_pickle_names_is_never_run(protocol: int) -> None:
    with pytest.raises(DiscoverError, match="may run what it names"):
        read_frame(pickle.dumps(_Runs(), protocol))
    assert not Path("/tmp/moe-guard-was-run").exists()


def test_a_pickle_of_something_else_is_refused() -> None:
    with pytest.raises(DiscoverError, match="something else than a pandas table"):
        read_frame(pickle.dumps({"layer": [1]}))


def test_a_table_whose_columns_are_fewer_than_it_says_is_refused() -> None:
    content = bytearray(FRAME.read_bytes())
    content[541] = 0
    with pytest.raises(DiscoverError, match="is no pickled table"):
        read_frame(bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x05r\xff\xff\xff\x7f.", "keeps more than"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x0f\x00\x00\x00x.", "is no pickled table"),
    ],
    ids=["a memo of 2**31 objects", "a bytearray of 60 GiB"],
)
def test_what_would_fill_the_memory_is_refused_first(content: bytes, message: str) -> None:
    with pytest.raises(DiscoverError, match=message):
        read_frame(content)


def test_a_name_with_half_of_a_character_is_told_so_that_it_can_be_shown() -> None:
    content = (
        pickle.BINUNICODE + struct.pack("<I", 3) + b"\xed\xa0\x80" + pickle.SHORT_BINUNICODE + b"\1x"
    )
    with pytest.raises(DiscoverError, match=r"names '\\ud800\.x', which") as refused:
        read_frame(pickle.PROTO + b"\4" + content + pickle.STACK_GLOBAL + pickle.STOP)
    str(refused.value).encode()


def test_a_tuple_in_the_place_of_a_name_is_refused_before_it_is_written_out() -> None:
    """Each of forty holds the next one twice."""
    content = FRAME.read_bytes()
    place = content.index(b"task") - 2
    tuples = pickle.EMPTY_TUPLE + 40 * (pickle.DUP + pickle.TUPLE2)
    changed = content[:place] + tuples + content[place + 6 :]
    with pytest.raises(DiscoverError, match="neither a number nor a text"):
        read_frame(_without_frames(changed, at=place))


def _without_frames(content: bytes, at: int) -> bytes:
    """The bytes of a pickle whose only frame begins ahead of `at`, without that frame's length."""
    start = content.index(pickle.FRAME)
    assert start < at
    return content[:start] + content[start + 9 :]


def test_a_number_of_any_length_is_no_cell() -> None:
    with pytest.raises(DiscoverError, match="more than 64 bits"):
        _cell(10**400)
    assert [_cell(number) for number in (2**64 - 1, -(2**63))] == [2**64 - 1, -(2**63)]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_pickle_is_refused_or_read_and_never_a_bug(data: st.DataObject) -> None:
    content = bytearray(FRAME.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DiscoverError):
        read_frame(bytes(content))


def test_easysteers_lists_are_sets_by_their_mode(tmp_path: Path) -> None:
    content = {
        "layer_configs": {
            "3": {"mode": "deactivate", "expert_ids": [1, 7]},
            "5": {"activate": [2], "deactivate": [9]},
        }
    }
    found = import_sets(write(tmp_path, content), "easysteer")
    assert as_profile_sets(found.sets) == {
        "deactivate": [{"layer": 3, "experts": [1, 7]}, {"layer": 5, "experts": [9]}],
        "activate": [{"layer": 5, "experts": [2]}],
    }


def test_esfts_experts_are_one_set(tmp_path: Path) -> None:
    found = import_sets(write(tmp_path, {"experts": {"2": [0, 3], "1": [5]}}), "esft")
    assert as_profile_sets(found.sets) == {
        "tuned": [{"layer": 1, "experts": [5]}, {"layer": 2, "experts": [0, 3]}]
    }


def test_a_mask_names_its_ones(tmp_path: Path) -> None:
    found = import_sets(write(tmp_path, [[0, 1, 0], [0, 0, 0], [1, 0, 1]]), "mask")
    assert as_profile_sets(found.sets) == {
        "named": [{"layer": 0, "experts": [1]}, {"layer": 2, "experts": [0, 2]}]
    }


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("mask", [[0, 2]], "row 0: is no list of 0 and 1"),
        ("mask", [[0, True]], "row 0: is no list of 0 and 1"),
        ("mask", [[0, 0]], "names no expert"),
        ("mask", {}, "is no list with a list of 0 and 1 for each layer"),
        ("esft", {"experts": [1]}, "has no 'experts' with an object by layer"),
        ("esft", {"experts": {"x": [1]}}, "'x' is no layer number from 0 to 4096"),
        ("esft", {"experts": {"1": [-1]}}, "'-1' is no expert number from 0 to 65535"),
        ("esft", {"experts": {"1": 3}}, "layer '1': its experts are no list"),
        ("easysteer", {"layer_configs": {"1": 3}}, "layer_configs['1']: is no object"),
        ("easysteer", "{", "cannot be read as JSON"),
        ("steermoe", "{}", "is no pickled table"),
        ("onnx", {}, "unknown format 'onnx'; there is easysteer, esft, mask and steermoe"),
    ],
)
def test_what_is_no_list_of_its_kind_is_refused(
    tmp_path: Path, kind: str, content: object, message: str
) -> None:
    with pytest.raises(DiscoverError) as error:
        import_sets(write(tmp_path, content), kind)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DiscoverError, match="cannot be read: No such file"):
        import_sets(tmp_path / "none", kind)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DiscoverError, match="larger than 64 MiB"):
        import_sets(large, kind)
