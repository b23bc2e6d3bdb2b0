"""The key that seals a decision log, and that nobody can turn back.

Line n is sealed with key n, and key n + 1 = HMAC-SHA-256(key n, "next key"), so who takes a server at
line n has keys that make later lines and none that makes an earlier one. The idea is that of
B. Schneier and J. Kelsey, "Secure Audit Logs to Support Computer Forensics" (ACM TISSEC, 1999);
journald's forward secure sealing does the same by time. The first key goes off the server before
the first line.

The key file is 512 bytes, written over in place after each line, as PostgreSQL's pg_control is: disks
do not tear a sector, and a process that is killed leaves the bytes of before or those of after. A file
that is put in the place of another would leave the old key behind in the blocks of that one.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from guard.errors import GuardError
from guard.events.log.chain import Head, Link, new_log, sha256

KEY_FILE_BYTES: Final = 512
MAX_STEPS: Final = 1_000_000
"""So many keys a server makes one after another to catch up with its log, in a second or two."""

_FORMAT: Final = "moe-guard-log-key/1"
_PRIVATE: Final = 0o600


class LogKeyError(GuardError):
    """A key of a decision log cannot be made, read or used."""


class SealingKey(NamedTuple):
    """head: the last line that was sealed
    key: for the line behind it
    """

    head: Head
    key: bytes

    @staticmethod
    def new() -> SealingKey:
        """Of a log that has no line yet."""
        return SealingKey(new_log(), secrets.token_bytes(32))

    def seal(self, line_ahead: bytes) -> str:
        return hmac.digest(self.key, line_ahead, "sha256").hex()

    def behind(self, head: Head) -> SealingKey:
        """For the line behind `head`, which is of this log and not ahead of it."""
        key = self.key
        for _ in range(head.n - self.head.n):
            key = hmac.digest(key, b"next key", "sha256")
        return SealingKey(head, key)

    def made(self, line: bytes, link: Link) -> bool:
        """Whether a line is sealed with this key."""
        return link.seal is not None and hmac.compare_digest(self.seal(line[: link.sealed]), link.seal)


class _KeyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """check: SHA-256 of the other fields, one a line, to see a damaged file by"""

    format: str
    log: str
    n: int
    hash: str
    key: str
    check: str

    @staticmethod
    def of(key: SealingKey) -> _KeyDocument:
        bare = _KeyDocument(_FORMAT, *key.head, key.key.hex(), "")
        return msgspec.structs.replace(bare, check=bare.right_check())

    def right_check(self) -> str:
        return sha256("\n".join((self.format, self.log, str(self.n), self.hash, self.key)).encode())


def verification_of(path: Path) -> Path:
    """Where the first key lies when it was made, beside the one that the server changes."""
    return path.with_name(f"{path.name}.verify")


def make_key_files(path: Path) -> None:
    """Write what the server seals with, and the same first key to verify with. Raises LogKeyError
    where one of them is there already, or cannot be written."""
    verification = verification_of(path)
    content = _content_of(SealingKey.new())
    for one in (verification, path):
        try:
            fd = os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)
        except FileExistsError:
            if one == path:
                verification.unlink()
            raise LogKeyError(
                f"{one} is there already; name another file: a log cannot go on with a new key"
            ) from None
        except OSError as error:
            raise LogKeyError(f"{one} cannot be written: {error.strerror}") from error
        try:
            os.write(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)


def read_key(path: Path) -> SealingKey:
    """Raises LogKeyError, also where others than its owner may read it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LogKeyError(
            f"the log's key {path} cannot be read: {error.strerror}; `moe-guard log key` makes one"
        ) from error
    try:
        return _read(fd, path)
    finally:
        os.close(fd)


class KeyFile:
    """A server's key file. What it says is shared by processes that hold the log's lock.

    Raises LogKeyError where it cannot be read or written, or would seal a first line in vain.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LogKeyError(
                f"the log's key {path} cannot be opened to be read and written: {error.strerror}; the "
                f"server changes it with each line. `moe-guard log key {path}` makes one"
            ) from error
        try:
            self._refuse_in_vain(_read(self._fd, path))
        except LogKeyError:
            os.close(self._fd)
            raise

    def read(self) -> SealingKey:
        return _read(self._fd, self._path)

    def write(self, key: SealingKey) -> None:
        """Raises OSError."""
        content = _content_of(key)
        if os.pwrite(self._fd, content, 0) != len(content):
            raise OSError(f"{self._path}: not all of the key was written")

    def sync(self) -> None:
        """Raises OSError."""
        os.fsync(self._fd)

    def _refuse_in_vain(self, key: SealingKey) -> None:
        first = verification_of(self._path)
        if key.head.n == 0 and first.exists():
            raise LogKeyError(
                f"{first} still lies beside the log's key: take it to where logs are verified. Who "
                "takes this server with it in place can forge every line"
            )

    def close(self) -> None:
        os.close(self._fd)


def _content_of(key: SealingKey) -> bytes:
    return msgspec.json.encode(_KeyDocument.of(key)).ljust(KEY_FILE_BYTES - 1) + b"\n"


def _read(fd: int, path: Path) -> SealingKey:
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & 0o077:
        raise LogKeyError(
            f"others may use the log's key {path} (its mode is {mode:03o}); chmod 600 it, and make "
            "a new one if they may have read it"
        )
    try:
        found = msgspec.json.decode(os.pread(fd, KEY_FILE_BYTES, 0), type=_KeyDocument)
        key = SealingKey(Head(found.log, found.n, found.hash), bytes.fromhex(found.key))
    except ValueError as error:
        raise LogKeyError(
            f"{path} is no key of a decision log ({error}); `moe-guard log key` makes one"
        ) from error
    if found.format != _FORMAT or found.check != found.right_check():
        raise LogKeyError(
            f"the log's key {path} is damaged; move the log away and begin a new one with a new key. "
            "What was sealed stays verifiable with the verification key"
        )
    return key
