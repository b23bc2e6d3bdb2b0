"""Policies at a URL: a bundle with a checksum or a signature, asked for again and again by its ETag.

The checksum is a document beside it, `URL.sha256` as sha256sum writes it, or a digest that the
operator pins in the settings. A signed bundle needs neither, may lie in a file as well, and is never
older than the one before it. What was put in force is kept in a file of this user's own, from which
the processes of a server read one and the same set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from guard.policy import PolicyError, PolicyTexts
from guard.source.bundle import MAX_BUNDLE_BYTES, read_bundle, read_numbered_bundle
from guard.source.http import Reply, check_url, get, shown
from guard.source.local import read_local
from guard.source.private_file import write_private
from guard.source.serial import Mark, Serials
from guard.source.signature import MAX_SIGNED_BYTES, PolicyKeys, is_signed
from guard.source.source import out_of_reach

logger = logging.getLogger(__name__)

JITTER: Final = 0.1
"""The share by which polls vary, so that many servers do not ask at once."""

MAX_DELAY_S: Final = 60.0
"""To this the polls slow down while a bundle cannot be had, unless they were as slow before."""

_MAX_CHECKSUM_BYTES: Final = 4096
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_PIN: Final = re.compile(r"sha256=([0-9a-fA-F]{64})")


def is_url(policies: str) -> bool:
    return "://" in policies


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleAddress:
    """Where a bundle is, and what makes it trustworthy.

    url: or, of a signed bundle, the path of a file
    sha256: the only content to take, by its digest; None: the one that URL.sha256 names
    cache: the folder for what is in force, from which a server may start while the URL is down;
        None: a folder of this user's, for this server's processes only
    token_variable: the environment variable with the bearer token
    allow_http: without encryption from other hosts than this one
    keys: of those who sign it; nothing else is taken then
    state: the folder that knows over restarts which signed bundle was last in force
    allow_rollback: take an older one than that
    """

    url: str
    sha256: str | None = None
    cache: Path | None = None
    token_variable: str | None = None
    allow_http: bool = False
    keys: PolicyKeys | None = None
    state: Path | None = None
    allow_rollback: bool = False

    @staticmethod
    def pinned(url: str) -> tuple[str, str | None]:
        """The URL without `#sha256=DIGEST`, and that digest.

        Raises PolicyError for anything else behind the #.
        """
        plain, hash_sign, fragment = url.partition("#")
        if not hash_sign:
            return url, None
        if (match := _PIN.fullmatch(fragment)) is None:
            raise out_of_reach(shown(url), "behind its # stands no sha256= with 64 digits")
        return plain, match[1]

    def check(self) -> None:
        """Raises PolicyError for an address that cannot be used."""
        if self.is_remote:
            check_url(self.url, allow_http=self.allow_http)
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise out_of_reach(self.shown, "bundle_sha256 must be the 64 digits that sha256sum prints")
        self.token()

    @property
    def is_remote(self) -> bool:
        return is_url(self.url)

    @property
    def shown(self) -> str:
        return shown(self.url) if self.is_remote else self.url

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
        kind = "tar.gz" if self.keys is None else "signed.json"
        return (self.cache or _user_cache()) / f"{digest}.{kind}"

    def fetch(self, etag: str | None, token: str | None) -> Reply:
        """Raises PolicyError."""
        max_bytes = MAX_BUNDLE_BYTES if self.keys is None else MAX_SIGNED_BYTES
        if not self.is_remote:
            return read_local(Path(self.url), max_bytes=max_bytes, etag=etag)
        allow_http = self.allow_http
        return get(self.url, max_bytes=max_bytes, etag=etag, token=token, allow_http=allow_http)

    def serials(self) -> Serials:
        return Serials(self.state, allow_rollback=self.allow_rollback)

    def opened(self, content: bytes) -> Opened:
        """What there is at the address, once it is known who published it.

        Raises PolicyError for a bundle that none of the keys signed, and for one that cannot be read.
        """
        if self.keys is None:
            if is_signed(content):
                raise out_of_reach(
                    self.shown, "is signed; say with policy_key by whom, or it is not taken"
                )
            return Opened(read_bundle(content, self.name))
        payload = self.keys.payload(content, self.shown)
        bundle = read_numbered_bundle(payload, self.name)
        return Opened(bundle.texts, Mark.of(bundle.serial, payload))

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


class Opened(NamedTuple):
    """mark: of a signed bundle"""

    texts: PolicyTexts
    mark: Mark | None = None


class BundleSource:
    """A bundle at a URL. Used by one thread."""

    def __init__(self, address: BundleAddress, *, seconds: float = 30.0) -> None:
        address.check()
        self._address = address
        self._seconds = seconds
        self._etag: str | None = None
        self._digest: str | None = None  # of the content that was polled last
        self._content = b""  # until it is kept
        self._mark: Mark | None = None  # of it
        self._serials = address.serials()
        self._failed = 0  # polls, one after another

    def resume(self) -> None:
        """What this server started with is in force, so that nothing older comes after it.

        Raises PolicyError where that cannot be read any more.
        """
        address = self._address
        if address.keys is None or address.state is not None or not address.kept_file.exists():
            return
        mark = address.opened(address.kept_file.read_bytes()).mark
        assert mark is not None, "it is signed"
        self._serials.note(mark, address.shown)

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
        reply = address.fetch(None if force else self._etag, token)
        if reply.content is None:
            return None
        digest = hashlib.sha256(reply.content).hexdigest()
        if digest == self._digest and not force:
            self._etag = reply.etag
            return None
        if address.keys is None:
            expected = address.sha256 or self._expected(token)
        else:
            expected = address.sha256 or digest
        if digest != expected.lower():
            raise out_of_reach(
                address.shown, f"has the SHA-256 {digest}, not {expected.lower()}; it was not taken"
            )
        texts, mark = address.opened(reply.content)
        if mark is not None:
            self._serials.check(mark, address.shown)
        self._etag, self._digest = reply.etag, digest
        self._content, self._mark = reply.content, mark
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
            write_private(self._address.kept_file, self._content, "bundle_cache")
            self._content = b""
        if self._mark is not None:
            self._serials.note(self._mark, self._address.shown)

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
    texts, mark = address.opened(content)
    if mark is not None:
        address.serials().check(mark, str(address.kept_file))
    return texts


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-guard" / "bundles"
