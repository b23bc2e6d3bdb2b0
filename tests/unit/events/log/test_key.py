"""The key's two files, and who may have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.events.log.chain import Head
from guard.events.log.key import (
    KEY_FILE_BYTES,
    KeyFile,
    LogKeyError,
    SealingKey,
    make_key_files,
    read_key,
    verification_of,
)
from tests.unit.events.log.chains import make_key


def test_both_files_hold_the_first_key_and_are_their_owners_alone(tmp_path: Path) -> None:
    key = tmp_path / "key"
    make_key_files(key)

    assert read_key(key) == read_key(verification_of(key))
    assert read_key(key).head.n == 0
    for path in (key, verification_of(key)):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_size == KEY_FILE_BYTES


@pytest.mark.parametrize("there", ["key", "key.verify"])
def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")

    with pytest.raises(LogKeyError, match="is there already"):
        make_key_files(tmp_path / "key")
    assert [one.name for one in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_a_server_does_not_seal_while_the_first_key_lies_beside_it(tmp_path: Path) -> None:
    key = tmp_path / "key"
    make_key_files(key)

    with pytest.raises(LogKeyError, match=r"key\.verify still lies beside"):
        KeyFile(key)
    verification_of(key).rename(tmp_path / "elsewhere")
    KeyFile(key).close()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o602, 0o601])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key"
    make_key(key)
    key.chmod(mode)

    for use in (read_key, KeyFile):
        with pytest.raises(LogKeyError, match=f"its mode is {mode:o}"):
            use(key)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "is no key of a decision log"),
        (b"secret", "is no key of a decision log"),
        (b"{}", "is no key of a decision log"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)

    for use in (read_key, KeyFile):
        with pytest.raises(LogKeyError, match=said):
            use(key)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogKeyError, match="cannot be written"):
        make_key_files(tmp_path / "nowhere" / "key")


@given(n=st.integers(0, 10**15 - 1), digest=st.sampled_from(["0" * 64, "f" * 64]))
def test_a_key_file_holds_any_place_of_a_log(
    tmp_path_factory: pytest.TempPathFactory, n: int, digest: str
) -> None:
    path = tmp_path_factory.mktemp("keys") / "key"
    first = make_key(path)
    file = KeyFile(path)
    key = SealingKey(Head(first.head.log, n, digest), b"k" * 32)
    file.write(key)
    file.sync()

    assert file.read() == read_key(path) == key
    assert path.stat().st_size == KEY_FILE_BYTES
    file.close()


@given(at=st.integers(0, KEY_FILE_BYTES - 1), with_=st.integers(1, 255))
def test_a_damaged_key_file_is_never_taken_for_another_key(
    tmp_path_factory: pytest.TempPathFactory, at: int, with_: int
) -> None:
    path = tmp_path_factory.mktemp("keys") / "key"
    first = make_key(path)
    content = bytearray(path.read_bytes())
    content[at] ^= with_
    path.write_bytes(content)

    try:
        assert read_key(path) == first
    except LogKeyError:
        return


def test_keys_follow_from_one_another_and_steps_do_not_matter() -> None:
    first = SealingKey.new()
    stepped = first
    for n in range(1, 6):
        stepped = stepped.behind(first.head._replace(n=n))

    assert first.behind(first.head._replace(n=5)) == stepped
    assert stepped.key != first.key
    assert stepped.seal(b"a") != first.seal(b"a")
