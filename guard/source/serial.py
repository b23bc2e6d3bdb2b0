"""Which signed bundle was last in force, so that an older one, signed as well, is not put back.

A signature says who published a bundle, not that it is the newest: whoever holds the URL could serve
last year's. So a bundle has a serial number inside what is signed.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final

import msgspec

from guard.policy import PolicyError
from guard.source.private_file import write_private
from guard.source.source import out_of_reach

logger = logging.getLogger(__name__)

SERIAL_FILE: Final = "bundle-serial.json"
_MAX_BYTES: Final = 4096


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """serial, and the SHA-256 of the archive that had it"""

    serial: int
    sha256: str

    @staticmethod
    def of(serial: int, payload: bytes) -> Mark:
        return Mark(serial, hashlib.sha256(payload).hexdigest())


class Serials:
    """Used by one thread.

    folder: keeps the mark over restarts; None: it holds until this process ends
    allow_rollback: let an older one in force, and go on from it
    """

    def __init__(self, folder: Path | None, *, allow_rollback: bool = False) -> None:
        self._file = None if folder is None else folder / SERIAL_FILE
        self._allow_rollback = allow_rollback
        self._mark: Mark | None = None

    def check(self, mark: Mark, name: str) -> None:
        """Raises PolicyError for one older than what was last in force, or another of that serial."""
        last = self.last()
        if last is None or self._allow_rollback or mark == last or mark.serial > last.serial:
            return
        if mark.serial == last.serial:
            message = f"has other content than the bundle that had serial {last.serial} before"
        else:
            message = f"has serial {mark.serial}, older than {last.serial}, which was in force"
        raise out_of_reach(
            name, f"{message}; publish it with the next serial, or let it with allow_rollback"
        )

    def note(self, mark: Mark, name: str) -> None:
        """It is in force. Raises PolicyError where that cannot be kept."""
        last = self.last()
        if mark == last:
            return
        if last is not None and mark.serial <= last.serial:
            logger.warning(
                "policies rolled back: %s has serial %d, after %d; allow_rollback lets it",
                *(name, mark.serial, last.serial),
            )
        self._mark = mark
        if self._file is not None:
            write_private(self._file, msgspec.json.encode(mark), "state_dir")

    def last(self) -> Mark | None:
        """Raises PolicyError where what was kept cannot be read: nothing is taken for granted then."""
        if self._file is None:
            return self._mark
        try:
            with self._file.open("rb") as stream:
                content = stream.read(_MAX_BYTES)
            return msgspec.json.decode(content, type=Mark)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(str(error.strerror)) from error
        except msgspec.MsgspecError as error:
            raise self._unreadable(str(error)) from error

    def _unreadable(self, why: str) -> PolicyError:
        return out_of_reach(
            str(self._file),
            f"does not say which bundle was last in force ({why}); mend it, or take it away to begin "
            "anew",
        )
