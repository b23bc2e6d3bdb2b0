"""Reads single files out of published wheels, without installing and mostly without downloading them.

Which index, which certificates and which credentials: what pip is configured with on this machine,
asked through pip's own finder. That is not a public interface of pip, but it has been stable for
years, and it is the one thing that reads every place where pip can be configured. A wheel's central
directory and the members wanted come by HTTP range requests; an index that cannot do them gives the
whole wheel. What was read stays in `.cache/`.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.version import Version

BLOCK_BYTES = 128 * 1024
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 45)]
"""Whatever this machine is: the Python files are the same in every platform's wheel."""


class IndexUnreachableError(Exception):
    """No index that pip knows has wheels of a distribution, or none could be asked."""


@dataclass(frozen=True, slots=True)
class Wheel:
    version: Version
    file_name: str
    url: str


class Index:
    """The package indexes that pip uses here."""

    def __init__(self, finder: Any, session: Any, cache: Path) -> None:
        self._finder = finder
        self._session = session
        self._cache = cache
        self._opened = ExitStack()

    def close(self) -> None:
        self._opened.close()

    def wheels(self, distribution: str) -> list[Wheel]:
        """Of each minor version its newest patch, oldest first. No pre-releases, none withdrawn.

        Raises IndexUnreachableError where there is none.
        """
        newest: dict[tuple[int, ...], Wheel] = {}
        for candidate in self._finder.find_all_candidates(distribution):
            version, link = Version(str(candidate.version)), candidate.link
            if not link.is_wheel or link.is_yanked or version.is_prerelease:
                continue
            wheel = Wheel(version, link.filename, link.url_without_fragment)
            known = newest.get(version.release[:2])
            if known is None or (known.version, known.file_name) < (version, wheel.file_name):
                newest[version.release[:2]] = wheel
        if not newest:
            raise IndexUnreachableError(
                f"pip finds no wheel of {distribution}: the index cannot be reached or has none"
            )
        return [newest[minor] for minor in sorted(newest)]

    def reader(self, wheel: Wheel) -> Callable[[str], str | None]:
        """Gives a member's text; None where the wheel has no such member."""
        folder = self._cache / wheel.file_name.removesuffix(".whl")
        archive: list[zipfile.ZipFile] = []

        def opened() -> zipfile.ZipFile:
            if not archive:
                file = self._opened.enter_context(self._open(wheel))
                archive.append(self._opened.enter_context(zipfile.ZipFile(file)))
            return archive[0]

        directory = folder / "members.json"
        if directory.is_file():
            members = set(json.loads(directory.read_text("utf-8")))
        else:
            members = set(opened().namelist())
            _write(directory, json.dumps(sorted(members)))

        def read_text(member: str) -> str | None:
            if member not in members:
                return None
            kept = folder / member
            if not kept.is_file():
                _write(kept, opened().read(member).decode("utf-8"))
            return kept.read_text("utf-8")

        return read_text

    def _open(self, wheel: Wheel) -> BinaryIO:
        if wheel.url.startswith("file:"):
            return Path(url2pathname(urlsplit(wheel.url).path)).open("rb")
        ranged = RangeReader(lambda first, last: self._range(wheel.url, first, last))
        if ranged.supported:
            return io.BufferedReader(ranged)
        kept = self._cache / wheel.file_name
        if not kept.is_file():
            self._download(wheel, kept)
        return kept.open("rb")

    def _range(self, url: str, first: int, last: int) -> tuple[bytes, int] | None:
        """Bytes first to last and the file's size; None where the server sends no ranges."""
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{last}"}
        with self._session.get(url, headers=headers, stream=True) as response:
            if response.status_code != 206:
                response.raise_for_status()
                return None
            return response.content, int(response.headers["Content-Range"].rpartition("/")[2])

    def _download(self, wheel: Wheel, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with self._session.get(wheel.url, stream=True) as response, part.open("wb") as file:
            response.raise_for_status()
            shutil.copyfileobj(response.raw, file)
        part.replace(target)


@contextmanager
def pip_index(cache: Path) -> Iterator[Index]:
    """The indexes of pip's configuration: its files, PIP_INDEX_URL and the like."""
    # Here, because pip changes how distutils is imported in the whole process.
    from pip._internal.cli.cmdoptions import make_target_python
    from pip._internal.commands import create_command

    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    command: Any = create_command("download")
    options, _ = command.parse_args(
        [
            *platforms,
            "--python-version=3.12",
            "--implementation=cp",
            "--abi=cp312",
            "--abi=abi3",
            "--no-deps",
            "--only-binary=:all:",
            "vllm",
        ]
    )
    with command.main_context():
        session = command._build_session(options, retries=2, timeout=15)
        target = make_target_python(options)
        finder = command._build_package_finder(options, session, target_python=target)
        index = Index(finder, session, cache)
        with closing(index):
            yield index


class RangeReader(io.RawIOBase):
    """A file elsewhere, read in blocks as they are needed.

    fetch: gives the bytes from the first to the last asked and the size of the whole, or None where
        ranges are not to be had; a block beyond the end comes short
    """

    def __init__(self, fetch: Callable[[int, int], tuple[bytes, int] | None]) -> None:
        self._fetch = fetch
        self._blocks: dict[int, bytes] = {}
        self._position = 0
        self._size = 0
        first = fetch(0, BLOCK_BYTES - 1)
        self.supported = first is not None
        if first is not None:
            self._blocks[0], self._size = first

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        block, offset = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._size:
            return 0
        piece = self._block(block)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _block(self, block: int) -> bytes:
        if block not in self._blocks:
            first = block * BLOCK_BYTES
            fetched = self._fetch(first, min(first + BLOCK_BYTES, self._size) - 1)
            if fetched is None:
                raise OSError("the server sent ranges at first and now does not")
            self._blocks[block] = fetched[0]
        return self._blocks[block]


def _write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run leaves nothing behind that a later one believes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
