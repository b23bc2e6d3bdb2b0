"""Fetching a Debian package, with stand-ins for apt-get and dpkg."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tools.debian_package import DebianPackageError, unpacked

APT = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
  *update) touch "{folder}/updated" ;;
  *"download tool")
    if [ -n "{needs_update}" ] && [ ! -e "{folder}/updated" ]; then echo "no lists" >&2; exit 100; fi
    touch tool_1_amd64.deb ;;
  *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
DPKG = '#!/bin/sh\n[ "$1" = -x ] && mkdir -p "$3/usr/bin" && echo hello > "$3/usr/bin/tool"\n'


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, *, needs_update: bool = False) -> Path:
    """apt-get's calls, a line each."""
    log = folder / "calls"
    log.touch()
    texts = {
        "apt-get": APT.format(log=log, folder=folder, needs_update="1" if needs_update else ""),
        "dpkg": DPKG,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_ins(tmp_path, monkeypatch)

    folders = [unpacked("tool", tmp_path / "cache") for _ in range(2)]

    assert folders == [tmp_path / "cache" / "tool"] * 2
    assert (folders[0] / "usr" / "bin" / "tool").read_text() == "hello\n"
    assert log.read_text() == "download tool\n"


def test_without_lists_it_fetches_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_ins(tmp_path, monkeypatch, needs_update=True)

    unpacked("tool", tmp_path / "cache")

    plain, update, again = log.read_text().splitlines()
    assert plain == "download tool"
    assert update.startswith(f"-oDir::State::lists={tmp_path / 'cache'}")
    assert update.endswith(" update")
    assert again == update.removesuffix("update") + "download tool"
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == ["tool", "tool.lock"]


def test_a_package_that_is_not_there_is_an_error_in_apts_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch)

    with pytest.raises(DebianPackageError, match="Unable to locate package"):
        unpacked("other", tmp_path / "cache")
    assert not (tmp_path / "cache" / "other").exists()


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DebianPackageError, match="apt-get is not here, so tool cannot be fetched"):
        unpacked("tool", tmp_path / "cache")


def test_processes_that_want_it_at_once_fetch_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stand_ins(tmp_path, monkeypatch)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=unpacked, args=("tool", tmp_path / "cache")) for _ in range(3)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "download tool\n"
