"""The folder that overrides live in: shared by the API servers of one server, and kept over restarts.

It also holds the policy texts that are in force, so that what an operator asks for does not depend on
what lies in the policy folder just then, and a log of who changed what.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from guard.overrides.model import OverrideError, Overrides
from guard.policy.texts import PolicyTexts
from guard.whole_file import write_whole

OVERRIDES: Final = "overrides.json"
IN_FORCE: Final = "policies-in-force.json"
AUDIT: Final = "audit.jsonl"
_LOCK: Final = "lock"
_PRIVATE: Final = 0o600
MAX_BYTES: Final = 256 << 20

_T = TypeVar("_T")


class OverrideStore:
    """folder: made with access for its owner alone

    Its methods raise OverrideError where the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One change at a time, of all processes. Waits."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, _PRIVATE)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def read(self) -> Overrides:
        """None were made where there is no file."""
        content = self._read(OVERRIDES)
        return Overrides() if content is None else self._decode(content, Overrides, OVERRIDES)

    def write(self, overrides: Overrides) -> None:
        self._write(OVERRIDES, msgspec.json.format(msgspec.json.encode(overrides)))

    def texts(self) -> PolicyTexts | None:
        """Of the policies in force; None where none were kept."""
        content = self._read(IN_FORCE)
        return None if content is None else self._decode(content, PolicyTexts, IN_FORCE)

    def keep_texts(self, texts: PolicyTexts) -> None:
        self._write(IN_FORCE, msgspec.json.encode(texts))

    def audit(self, by: str, what: str, reason: str, outcome: str, **facts: Any) -> None:
        """A line of the log of changes."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "by": by,
            "what": what,
            "reason": reason,
            "outcome": outcome,
            **facts,
        }
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self.folder / AUDIT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _PRIVATE)
            try:
                os.write(file, msgspec.json.encode(line) + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            raise self._unusable(error) from error

    def _read(self, name: str) -> bytes | None:
        try:
            with (self.folder / name).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        if len(content) > MAX_BYTES:
            raise OverrideError(f"{self.folder / name} is larger than {MAX_BYTES >> 20} MiB")
        return content

    def _decode(self, content: bytes, kind: type[_T], name: str) -> _T:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise OverrideError(
                f"{self.folder / name} cannot be read ({error}); mend it, or take it away and mask "
                "again"
            ) from error

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        try:
            write_whole(self.folder / name, content)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> OverrideError:
        return OverrideError(
            f"the state folder {self.folder} cannot be used ({error.strerror}); give the server's user "
            "a folder that it may write, with --state-dir"
        )
