"""One GET of a document, with limits on everything that a server may do to the one who asks."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Final, NamedTuple

from guard.policy import PolicyError
from guard.source.source import out_of_reach

TIMEOUT_S: Final = 10.0
"""How long the server may be silent."""

MAX_SECONDS: Final = 60.0
"""How long a document may take as a whole."""

_CHUNK_BYTES: Final = 1 << 16
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")


class Reply(NamedTuple):
    """content None: it has not changed since the one with that ETag."""

    content: bytes | None
    etag: str | None


def check_url(url: str, *, allow_http: bool) -> None:
    """Raises PolicyError for a URL that policies cannot be taken from safely."""
    place = shown(url)
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError:  # such as a broken IPv6 address
        host = None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if host is None or parts.scheme not in ("https", "http") or not is_plain:
        raise out_of_reach(place, "is no URL to take policies from; give https://host/path.tar.gz")
    if "@" in parts.netloc:
        raise out_of_reach(
            place, "has a password in it, which logs would show; use bundle_token_variable"
        )
    if parts.scheme == "http" and host not in _LOCAL and not allow_http:
        raise out_of_reach(
            place, "is not encrypted; use https, or set bundle_allow_http where the way is trusted"
        )


def shown(url: str) -> str:
    """The URL for people and logs: without a query or a password, which may be secret."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".partition("?")[0].partition("#")[0]


def get(
    url: str,
    *,
    max_bytes: int,
    etag: str | None = None,
    token: str | None = None,
    allow_http: bool = False,
) -> Reply:
    """Raises PolicyError where the document cannot be had, is too large or takes too long."""
    check_url(url, allow_http=allow_http)
    request = urllib.request.Request(url, headers={"Accept": "*/*", "User-Agent": "moe-guard"})
    if etag is not None:
        request.add_header("If-None-Match", etag)
    if token is not None:
        # Not sent on to where a redirect leads.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with _opener(allow_http).open(request, timeout=TIMEOUT_S) as response:
            tag = response.headers.get("ETag")
            is_plain = tag is not None and tag.isascii() and tag.isprintable()
            content = _read(response, max_bytes, shown(url))
            return Reply(content, tag if is_plain else None)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 304 and etag is not None:
            return Reply(None, etag)
        raise out_of_reach(shown(url), f"answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise out_of_reach(shown(url), f"cannot be reached: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise out_of_reach(shown(url), f"broke off: {str(error) or type(error).__name__}") from error


def _read(response: http.client.HTTPResponse, max_bytes: int, place: str) -> bytes:
    deadline = time.monotonic() + MAX_SECONDS
    content = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):  # what has come, so that the deadline is seen
        content += chunk
        if len(content) > max_bytes:
            raise out_of_reach(place, f"is larger than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise out_of_reach(place, f"did not arrive within {MAX_SECONDS:.0f} s")
    return bytes(content)


class _SameScheme(urllib.request.HTTPRedirectHandler):
    def __init__(self, *, allow_http: bool) -> None:
        self._allow_http = allow_http

    def redirect_request(
        self,
        request: urllib.request.Request,
        stream: IO[bytes],
        code: int,
        message: str,
        headers: http.client.HTTPMessage,
        url: str,
    ) -> urllib.request.Request | None:
        try:
            if urllib.parse.urlsplit(url).scheme != urllib.parse.urlsplit(request.full_url).scheme:
                text = f"redirects to {shown(url)}, which has another scheme"
                raise out_of_reach(shown(request.full_url), text)
            check_url(url, allow_http=self._allow_http)
        except PolicyError:
            stream.close()
            raise
        return super().redirect_request(request, stream, code, message, headers, url)


def _opener(allow_http: bool) -> urllib.request.OpenerDirector:
    """urllib's own has handlers for file: and ftp: too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _SameScheme(allow_http=allow_http),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
