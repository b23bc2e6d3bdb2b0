"""Policies in files: every way in which they change is noticed, and a set is read whole."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guard.policy import PolicyError, PolicyTexts, load_texts
from guard.policy.texts import Text
from guard.source.files import MAX_TRIES, FileSource
from tests.unit.source.writing import PROFILE, policy, write


def no_pause(_: float) -> None:
    """Nothing else happens meanwhile."""


def names(texts: PolicyTexts | None) -> list[str] | None:
    return None if texts is None else sorted(p.name for p in load_texts(texts).policies)


def revisions(texts: PolicyTexts | None) -> set[str]:
    assert texts is not None
    return {match[1] for text in texts.policies if (match := re.search(r"atLeast: (\d+)", text.text))}


def touch_later(file: Path) -> None:
    """As a write that comes after the file system's clock went on, however fast this test is."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10_000_000))


def rewrite(folder: Path) -> None:
    (folder / "a.yaml").write_text(policy("c"))
    touch_later(folder / "a.yaml")


def replace_by_rename(folder: Path) -> None:
    (folder / ".a.yaml.swp").write_text(policy("c"))
    os.replace(folder / ".a.yaml.swp", folder / "a.yaml")


def keep_size_and_time(folder: Path) -> None:
    before = (folder / "a.yaml").stat()
    (folder / "new").write_text(policy("c"))
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "new", folder / "a.yaml")


def add(folder: Path) -> None:
    write(folder / "more", d=policy("d"))


def remove(folder: Path) -> None:
    (folder / "b.yaml").unlink()


def rename(folder: Path) -> None:
    (folder / "b.yaml").rename(folder / "b.yaml.bak")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rewrite, ["b", "c"]),
        (replace_by_rename, ["b", "c"]),
        (keep_size_and_time, ["b", "c"]),
        (add, ["a", "b", "d"]),
        (remove, ["a"]),
        (rename, ["a"]),
    ],
    ids=["rewritten", "replaced", "same size and time", "added", "removed", "renamed"],
)
def test_a_changed_folder_is_read_once(
    tmp_path: Path, change: Callable[[Path], None], expected: list[str]
) -> None:
    source = FileSource(write(tmp_path / "p", a=policy("a"), b=policy("b")), pause=no_pause)

    assert names(source.poll()) == ["a", "b"]
    assert source.poll() is None
    change(tmp_path / "p")
    assert names(source.poll()) == expected
    assert source.poll() is None
    assert names(source.poll(force=True)) == expected


def test_a_single_file_is_watched_too(tmp_path: Path) -> None:
    file = write(tmp_path, a=policy("a")) / "a.yaml"
    source = FileSource(file, pause=no_pause)

    assert names(source.poll()) == ["a"]
    replace_by_rename(tmp_path)
    assert names(source.poll()) == ["c"]


@pytest.mark.parametrize("name", [".a.yaml.swp", "a.yaml~", "#a.yaml#", "4913", "a.yaml___jb_tmp___"])
def test_what_editors_leave_behind_is_no_change(tmp_path: Path, name: str) -> None:
    source = FileSource(write(tmp_path, a=policy("a")), pause=no_pause)

    source.poll()
    (tmp_path / name).write_text("half a pol")
    (tmp_path / ".#a.yaml").symlink_to("nobody@nowhere.1")
    assert source.poll() is None


def test_a_file_behind_a_link_is_looked_at_where_it_is(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", a=policy("a"))
    folder = write(tmp_path / "p")
    (folder / "a.yaml").symlink_to(elsewhere / "a.yaml")
    source = FileSource(folder, pause=no_pause)

    source.poll()
    rewrite(elsewhere)
    assert names(source.poll()) == ["c"]


def test_a_profile_that_policies_name_belongs_to_the_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a=policy("a", profile="../m.json"))
    source = FileSource(folder, pause=no_pause)

    with pytest.raises(PolicyError, match=r"m\.json is no file"):
        names(source.poll())
    (tmp_path / "m.json").write_text(PROFILE)
    assert names(source.poll()) == ["a"]
    assert source.poll() is None
    (tmp_path / "m.json").write_text(PROFILE.replace('"M"', '"Other"'))
    texts = source.poll()
    assert texts is not None
    assert texts.profiles == (Text(f"{folder}/../m.json", PROFILE.replace('"M"', '"Other"')),)


def config_map(mount: Path, revision: str, *policies: str) -> None:
    """As the kubelet publishes one: a new folder, `..data` put on it in one step, the old one gone."""
    write(mount / f"..{revision}", **{name: policy(f"{name}-{revision}") for name in policies})
    (mount / "..data_tmp").symlink_to(f"..{revision}")
    old = os.path.realpath(mount / "..data")
    os.replace(mount / "..data_tmp", mount / "..data")
    for name in policies:
        if not (mount / f"{name}.yaml").is_symlink():
            (mount / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    if os.path.basename(old) != "..data":
        shutil.rmtree(old)


def test_a_config_map_that_is_swapped_is_read_anew(tmp_path: Path) -> None:
    config_map(tmp_path, "1", "a", "b")
    source = FileSource(tmp_path, pause=no_pause)

    assert names(source.poll()) == ["a-1", "b-1"]
    config_map(tmp_path, "2", "a", "b")
    assert names(source.poll()) == ["a-2", "b-2"]
    assert source.poll() is None


def release(root: Path, revision: int) -> None:
    """`current` is put on a new folder in one step, and the one before is removed."""
    folder = write(
        root / f"rev{revision}", **{name: policy(name, at_least=revision + 1) for name in "abcd"}
    )
    (root / "next").symlink_to(folder.name)
    os.replace(root / "next", root / "current")
    shutil.rmtree(root / f"rev{revision - 1}", ignore_errors=True)


def test_a_release_link_that_is_put_elsewhere_is_followed(tmp_path: Path) -> None:
    release(tmp_path, 0)
    source = FileSource(tmp_path / "current", pause=no_pause)

    source.poll()
    release(tmp_path, 1)
    assert revisions(source.poll()) == {"2"}


def test_a_file_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, a=policy("a"))
    rest = iter([": Pol", "icy\n# and more\n"])

    def the_writer_goes_on(_: float) -> None:
        for piece in rest:
            with (tmp_path / "b.yaml").open("a") as stream:
                stream.write(piece)
            return

    source = FileSource(tmp_path, pause=the_writer_goes_on)
    (tmp_path / "b.yaml").write_text("kind")

    texts = source.poll()

    assert texts is not None
    assert texts.policies[1].text == "kind: Policy\n# and more\n"


def test_files_that_do_not_come_to_rest_are_refused_and_looked_at_again(tmp_path: Path) -> None:
    write(tmp_path, a="")
    looks = 0

    def always_writing(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks <= MAX_TRIES:
            (tmp_path / "a.yaml").write_text("#" * looks)

    source = FileSource(tmp_path, pause=always_writing)

    with pytest.raises(PolicyError, match="do not come to rest"):
        source.poll()
    assert source.poll() is not None


def test_a_folder_that_vanished_is_a_fault_once_and_read_when_it_is_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", a=policy("a"))
    source = FileSource(folder, pause=no_pause)

    source.poll()
    folder.rename(tmp_path / "away")
    with pytest.raises(PolicyError, match="there is no such file or folder"):
        names(source.poll())
    assert source.poll() is None
    (tmp_path / "away").rename(folder)
    assert names(source.poll()) == ["a"]


@pytest.fixture
def releasing(tmp_path: Path) -> Iterator[Path]:
    """A folder whose `current` is put on new releases without a break, as fast as it goes."""
    release(tmp_path, 0)
    stop = threading.Event()

    def run() -> None:
        revision = 0
        while not stop.is_set():
            revision += 1
            release(tmp_path, revision)

    writer = threading.Thread(target=run)
    writer.start()
    yield tmp_path
    stop.set()
    writer.join()


def test_a_set_that_is_read_while_releases_change_is_never_mixed(releasing: Path) -> None:
    source = FileSource(releasing / "current", pause=no_pause)
    seen = set()
    for _ in range(2_000):
        try:
            texts = source.poll(force=True)
        except PolicyError as error:
            if "do not come to rest" not in str(error):
                raise
            continue
        assert texts is not None
        one, *others = revisions(texts)
        assert (len(texts.policies), others, texts.faults) == (4, [], ())
        seen.add(one)
        if len(seen) >= 20:
            return
    pytest.fail(f"only {len(seen)} releases were seen whole")
