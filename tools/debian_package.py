"""Fetches Debian packages into `.cache/debian/`, for programs that tests run. Needs apt, not root.

`make test` does it before the tests, `tools/prometheus.py` at first use. apt checks what it
fetches against signed lists. Nothing is installed: no dependency, no script of the package.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "debian"
_TIMEOUT_S = 300.0


class DebianPackageError(Exception):
    """A package cannot be had here."""


def unpacked(package: str, cache: Path = CACHE) -> Path:
    """The folder in which the package is unpacked; fetched where it is not there yet.

    Safe to call from several processes at once. Raises DebianPackageError.
    """
    target = cache / package
    if target.is_dir():
        return target
    for command in ("apt-get", "dpkg"):
        if shutil.which(command) is None:
            raise DebianPackageError(f"{command} is not here, so {package} cannot be fetched")
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{package}.lock"), tempfile.TemporaryDirectory(dir=cache) as name:
        if target.is_dir():  # another process was faster
            return target
        work = Path(name)
        fresh = work / "unpacked"
        _run(["dpkg", "-x", str(_fetched(package, work)), str(fresh)], work)
        fresh.rename(target)
    return target


def _fetched(package: str, work: Path) -> Path:
    """With this machine's package lists; where these are missing or too old, with lists of its own."""
    download = ["download", package]
    try:
        _run(["apt-get", *download], work)
    except DebianPackageError:
        own = [f"-oDir::State::lists={work / 'lists'}", f"-oDir::Cache={work / 'cache'}"]
        for folder in ("lists/partial", "cache/archives/partial"):
            (work / folder).mkdir(parents=True)
        _run(["apt-get", *own, "update"], work)
        _run(["apt-get", *own, *download], work)
    found = list(work.glob("*.deb"))
    if len(found) != 1:
        raise DebianPackageError(f"apt-get left {len(found)} packages for {package}")
    return found[0]


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise DebianPackageError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise DebianPackageError(f"{' '.join(command)} took over {_TIMEOUT_S:g} s") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """The lock goes with the process that holds it, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", nargs="+")
    try:
        for package in parser.parse_args().package:
            print(unpacked(package))
    except DebianPackageError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
