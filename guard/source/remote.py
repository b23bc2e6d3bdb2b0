"""Policies at a URL: a bundle with a checksum, asked for again and again by its ETag.

The checksum is a document beside it, `URL.sha256` as sha256sum writes it, or a digest that the
operator pins in the settings. What was put in force is kept in a file of this user's own, from which
the processes of a server read one and the same set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guard.policy import PolicyError, PolicyTexts
from guard.source.bundle import MAX_BUNDLE_BYTES, read_bundle
from guard.source.http import check_url, get, shown
from guard.source.source import out_of_reach

logger = logging.getLogger(__name__)

JITTER: Final = 0.1
"""The share by which polls vary, so that many servers do not ask at once."""

MAX_DELAY_S: Final = 60.0
"""To this the polls slow down while a bundle cannot be had, unless they were as slow before."""

_MAX_CHECKSUM_BYTES: Final = 4096
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")


def is_url(policies: str) -> bool:
    return "://" in policies


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleAddress:
    """Where a bundle is, and what makes it trustworthy.

    sha256: the only content to take, by its digest; None: the one that URL.sha256 names
    cache: the folder for what is in force, from which a server may start while the URL is down;
        None: a folder of this user's, for this server's processes only
    token_variable: the environment variable with the bearer token
    allow_http: without encryption from other hosts than this one
    """

    url: str
    sha256: str | None = None
    cache: Path | None = None
    token_variable: str | None = None
    allow_http: bool = False

    def check(self) -> None:
        """Raises PolicyError for an address that cannot be used."""
        check_url(self.url, allow_http=self.allow_http)
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise out_of_reach(self.shown, "bundle_sha256 must be the 64 digits that sha256sum prints")
        self.token()

    @property
    def shown(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """What faults call the bundle: the end of its URL."""
        return self.shown.rpartition("/")[2] or "bundle"

    @property
    def checksum_url(self) -> str:
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit(parts._replace(path=parts.path + ".sha256"))

    @property
    def kept_file(self) -> Path:
        """The same in every process of a server, and at its next start."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return (self.cache or _user_cache()) / f"{digest}.tar.gz"

    def token(self) -> str | None:
        """Raises PolicyError where it is named but not there; the message does not show it."""
        if self.token_variable is None:
            return None
        token = os.environ.get(self.token_variable, "").strip()
        if not token:
            raise out_of_reach(
                self.shown, f"the environment variable {self.token_variable} holds no token"
            )
        if not (token.isascii() and token.isprintable()):
            raise out_of_reach(
                self.shown, f"the token in {self.token_variable} has characters that no header takes"
            )
        return token


class BundleSource:
    """A bundle at a URL. Used by one thread."""

    def __init__(self, address: BundleAddress, *, seconds: float = 30.0) -> None:
        address.check()
        self._address = address
        self._seconds = seconds
        self._etag: str | None = None
        self._digest: str | None = None  # of the content that was polled last
        self._content = b""  # until it is kept
        self._failed = 0  # polls, one after another

    @property
    def name(self) -> str:
        return self._address.shown

    def poll(self, *, force: bool = False) -> PolicyTexts | None:
        self._failed += 1
        texts = self._poll(force=force)
        self._failed = 0
        return texts

    def _poll(self, *, force: bool) -> PolicyTexts | None:
        address, token = self._address, self._address.token()
        reply = get(
            address.url,
            max_bytes=MAX_BUNDLE_BYTES,
            etag=None if force else self._etag,
            token=token,
            allow_http=address.allow_http,
        )
        if reply.content is None:
            return None
        digest = hashlib.sha256(reply.content).hexdigest()
        if digest == self._digest and not force:
            self._etag = reply.etag
            return None
        expected = address.sha256 or self._expected(token)
        if digest != expected.lower():
            raise out_of_reach(
                address.shown, f"has the SHA-256 {digest}, not {expected.lower()}; it was not taken"
            )
        texts = read_bundle(reply.content, address.name)
        self._etag, self._digest, self._content = reply.etag, digest, reply.content
        return texts

    def _expected(self, token: str | None) -> str:
        url = self._address.checksum_url
        reply = get(
            url, max_bytes=_MAX_CHECKSUM_BYTES, token=token, allow_http=self._address.allow_http
        )
        words = (reply.content or b"").decode("ascii", "replace").split()
        if not words or not _SHA256.fullmatch(words[0]):
            raise out_of_reach(shown(url), "does not begin with a SHA-256 of 64 digits")
        return words[0]

    def keep(self) -> None:
        if self._content:
            _write_private(self._address.kept_file, self._content)
            self._content = b""

    def delay_s(self) -> float:
        slowed = min(self._seconds * 2.0 ** min(self._failed, 30), MAX_DELAY_S)
        seconds = max(self._seconds, slowed) if self._failed else self._seconds
        return seconds * random.uniform(1 - JITTER, 1 + JITTER)


def fetch_at_start(address: BundleAddress) -> tuple[PolicyTexts, BundleSource]:
    """The bundle as it is now; where it cannot be had and the operator chose a cache, the one that was
    in force last. The caller keeps it when it proves good.

    Raises PolicyError.
    """
    source = BundleSource(address)
    try:
        texts = source.poll(force=True)
    except PolicyError as error:
        if address.cache is None or not address.kept_file.exists():
            raise
        logger.warning("MoE Guard starts with the policies of its last run: %s", error)
        return kept(address), source
    assert texts is not None, "it was forced"
    return texts, source


def kept(address: BundleAddress) -> PolicyTexts:
    """The bundle that was put in force on this host; where there is none, as on another node, it is
    fetched.

    Raises PolicyError.
    """
    try:
        content = address.kept_file.read_bytes()
    except FileNotFoundError:
        texts, source = fetch_at_start(address)
        source.keep()
        return texts
    except OSError as error:
        raise out_of_reach(str(address.kept_file), f"cannot be read: {error.strerror}") from error
    if address.sha256 and hashlib.sha256(content).hexdigest() != address.sha256.lower():
        raise out_of_reach(str(address.kept_file), "is not the bundle that bundle_sha256 pins")
    return read_bundle(content, address.name)


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-guard" / "bundles"


def _write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, and readable by this user only.

    Raises PolicyError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # made with 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise out_of_reach(
            str(path),
            f"cannot be written: {error.strerror}; set bundle_cache to a folder that can be",
        ) from error
