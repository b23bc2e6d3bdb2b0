"""The order of signed bundles: no older one comes back, over restarts, unless the operator lets it."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy import PolicyError
from guard.source.serial import SERIAL_FILE, Mark, Serials


def mark(serial: int, content: bytes = b"x") -> Mark:
    return Mark.of(serial, content)


def refusal(serials: Serials, one: Mark) -> str:
    with pytest.raises(PolicyError) as caught:
        serials.check(one, "b")
    return str(caught.value)


def in_force(serials: Serials, one: Mark) -> None:
    serials.check(one, "b")
    serials.note(one, "b")


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "of this process"])
def test_an_older_bundle_is_refused_and_the_same_and_a_newer_are_not(
    tmp_path: Path, is_kept: bool
) -> None:
    serials = Serials(tmp_path if is_kept else None)
    in_force(serials, mark(7))

    assert "has serial 6, older than 7" in refusal(serials, mark(6))
    assert "other content than the bundle that had serial 7" in refusal(serials, mark(7, b"y"))
    serials.check(mark(7), "b")
    serials.check(mark(8), "b")


def test_what_was_only_looked_at_is_not_in_force(tmp_path: Path) -> None:
    serials = Serials(tmp_path)
    in_force(serials, mark(7))
    serials.check(mark(9), "b")
    serials.check(mark(8), "b")


def test_it_is_kept_over_a_restart_and_private(tmp_path: Path) -> None:
    in_force(Serials(tmp_path / "state"), mark(7))

    assert "older than 7" in refusal(Serials(tmp_path / "state"), mark(6))
    assert stat.S_IMODE((tmp_path / "state" / SERIAL_FILE).stat().st_mode) == 0o600
    Serials(None).check(mark(6), "b")  # without a folder it holds until this process ends


def test_an_operator_may_let_an_older_one_in_and_goes_on_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_force(Serials(tmp_path), mark(7))
    with caplog.at_level(logging.WARNING):
        in_force(Serials(tmp_path, allow_rollback=True), mark(5))

    assert "policies rolled back: b has serial 5, after 7" in caplog.text
    serials = Serials(tmp_path)
    serials.check(mark(5), "b")
    serials.check(mark(6), "b")
    assert "older than 5" in refusal(serials, mark(4))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"serial": "7", "sha256": ""}', b"\xff"])
def test_where_it_cannot_be_read_nothing_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SERIAL_FILE).write_bytes(content)
    assert "does not say which bundle was last in force" in refusal(Serials(tmp_path), mark(9))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="cannot"):
        Serials(tmp_path / "file").note(mark(1), "b")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_what_is_in_force_never_falls(asked: list[int]) -> None:
    serials, taken = Serials(None), []
    for serial in asked:
        try:
            in_force(serials, mark(serial))
        except PolicyError:
            continue
        taken.append(serial)
    assert taken == sorted(taken)
    assert taken[-1] == max(asked)
