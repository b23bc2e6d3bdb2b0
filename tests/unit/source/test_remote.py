"""Bundles over HTTP, from a real server on this host."""

from __future__ import annotations

import hashlib
import logging
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from guard.policy import PolicyError, PolicyTexts
from guard.source import remote
from guard.source.http import get, shown
from guard.source.remote import BundleAddress, BundleSource, fetch_at_start, kept
from tests.unit.source.writing import bundle, policy

PATH = "/bundle.tar.gz"
ONE, TWO = bundle(one=policy("one")), bundle(two=policy("two"))


@dataclass
class Host:
    """What the server answers, and what it was asked."""

    documents: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    location: dict[str, str] = field(default_factory=dict)
    has_etags: bool = True
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def publish(self, content: bytes, checksum: str | None = None) -> None:
        digest = checksum or hashlib.sha256(content).hexdigest()
        self.documents = {PATH: content, PATH + ".sha256": f"{digest}  bundle.tar.gz\n".encode()}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            etag, token = self.headers.get("If-None-Match"), self.headers.get("Authorization")
            state.asked.append((self.path, etag, token))
            content = state.documents.get(path)
            own = None if content is None else f'"{hashlib.sha256(content).hexdigest()[:8]}"'
            status = state.status.get(path, 200 if content is not None else 404)
            if state.has_etags and own is not None and own == etag:
                status = 304
            self.send_response(status)
            if path in state.location:
                self.send_header("Location", state.location[path])
            if state.has_etags and own is not None:
                self.send_header("ETag", own)
            self.send_header("Content-Length", str(len(content or b"") if status == 200 else 0))
            self.end_headers()
            if status == 200 and content is not None:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}{PATH}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def files(texts: PolicyTexts | None) -> list[str] | None:
    return None if texts is None else [text.file for text in texts.policies]


def refusal(source: BundleSource) -> str:
    with pytest.raises(PolicyError) as caught:
        source.poll()
    return str(caught.value)


def test_a_bundle_is_fetched_once_and_again_when_it_changed(host: Host) -> None:
    host.publish(ONE)
    source = BundleSource(BundleAddress(url=host.url))

    assert files(source.poll()) == ["bundle.tar.gz/policies/one.yaml"]
    host.asked.clear()
    assert source.poll() is None
    assert [(path, etag is not None) for path, etag, _ in host.asked] == [(PATH, True)]
    host.publish(TWO)
    assert files(source.poll()) == ["bundle.tar.gz/policies/two.yaml"]
    assert files(source.poll(force=True)) == ["bundle.tar.gz/policies/two.yaml"]


def test_a_server_without_etags_is_told_apart_by_content(host: Host) -> None:
    host.has_etags = False
    host.publish(ONE)
    source = BundleSource(BundleAddress(url=host.url))

    assert source.poll() is not None
    assert source.poll() is None
    host.publish(TWO)
    assert source.poll() is not None


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "answers 404"), (500, "answers 500"), (503, "answers 503"), (401, "answers 401")],
)
def test_a_server_that_has_no_bundle_is_a_fault_and_asked_again(
    host: Host, status: int, message: str
) -> None:
    host.publish(ONE)
    source = BundleSource(BundleAddress(url=host.url))
    source.poll()

    host.publish(TWO)
    host.status[PATH] = status
    assert message in refusal(source)
    host.status.clear()
    assert files(source.poll()) == ["bundle.tar.gz/policies/two.yaml"]


def test_a_server_that_cannot_be_reached_is_a_fault(host: Host) -> None:
    port = host.url.rpartition(":")[2].partition("/")[0]
    source = BundleSource(BundleAddress(url=host.url.replace(port, "1")))

    assert "http://127.0.0.1:1/bundle.tar.gz: cannot be reached" in refusal(source)


def test_a_bundle_that_is_not_the_one_of_its_checksum_is_not_taken(host: Host) -> None:
    host.publish(ONE, checksum="0" * 64)
    source = BundleSource(BundleAddress(url=host.url))

    assert "has the SHA-256 " in refusal(source)
    assert "has the SHA-256 " in refusal(source)  # not forgotten behind an ETag
    host.publish(ONE)
    assert source.poll() is not None


@pytest.mark.parametrize(
    "checksum", [None, b"", b"<html>", b"abc"], ids=["missing", "empty", "a page", "short"]
)
def test_a_bundle_without_a_checksum_is_not_taken(host: Host, checksum: bytes | None) -> None:
    host.publish(ONE)
    del host.documents[PATH + ".sha256"]
    if checksum is not None:
        host.documents[PATH + ".sha256"] = checksum
    source = BundleSource(BundleAddress(url=host.url))

    expected = "answers 404" if checksum is None else "does not begin with a SHA-256"
    assert f"{host.url}.sha256: {expected}" in refusal(source)


def test_a_pinned_digest_needs_no_checksum_beside_the_bundle(host: Host) -> None:
    host.documents[PATH] = ONE
    digest = hashlib.sha256(ONE).hexdigest().upper()

    assert BundleSource(BundleAddress(url=host.url, sha256=digest)).poll() is not None
    host.publish(TWO)
    assert "has the SHA-256 " in refusal(BundleSource(BundleAddress(url=host.url, sha256=digest)))


def test_the_checksum_of_a_url_with_a_query_lies_beside_its_path(host: Host) -> None:
    host.publish(ONE)

    assert BundleSource(BundleAddress(url=host.url + "?v=1")).poll() is not None
    assert [path for path, _, _ in host.asked] == [PATH + "?v=1", PATH + ".sha256?v=1"]


def test_a_document_that_is_too_large_is_given_up(host: Host) -> None:
    host.documents[PATH] = bytes(5000)
    with pytest.raises(PolicyError, match="is larger than 4999 bytes"):
        get(host.url, max_bytes=4999)


def test_an_archive_that_is_none_is_a_fault_at_every_poll(host: Host) -> None:
    host.publish(b"no archive")
    source = BundleSource(BundleAddress(url=host.url))

    assert "no gzip-compressed archive" in refusal(source)
    assert "no gzip-compressed archive" in refusal(source)


@pytest.mark.parametrize(
    "target", ["file:///etc/hosts", "ftp://127.0.0.1/b", "https://127.0.0.1/b", "http://198.51.100.7/b"]
)
def test_a_redirect_leads_neither_to_another_scheme_nor_to_where_it_is_not_safe(
    host: Host, target: str
) -> None:
    host.status[PATH], host.location[PATH] = 302, target
    message = refusal(BundleSource(BundleAddress(url=host.url)))

    assert "is not encrypted" in message or "another scheme" in message or "answers 302" in message


def test_a_token_is_sent_to_the_server_but_not_on_to_where_it_redirects(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLICY_TOKEN", " s3cret\n")
    host.publish(ONE)
    host.documents["/moved"] = host.documents.pop(PATH)
    host.status[PATH], host.location[PATH] = 302, "/moved"
    address = BundleAddress(url=host.url, token_variable="POLICY_TOKEN")

    assert BundleSource(address).poll() is not None
    assert [(path, token) for path, _, token in host.asked] == [
        (PATH, "Bearer s3cret"),
        ("/moved", None),
        (PATH + ".sha256", "Bearer s3cret"),
    ]


@pytest.mark.parametrize(
    "token", [None, "", "two\nlines", "ünicode"], ids=["unset", "empty", "two lines", "not ASCII"]
)
def test_a_token_that_cannot_be_sent_is_a_fault_that_does_not_show_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token is not None:
        monkeypatch.setenv("POLICY_TOKEN", token)
    with pytest.raises(PolicyError) as caught:
        BundleSource(BundleAddress(url=host.url, token_variable="POLICY_TOKEN"))

    assert "POLICY_TOKEN" in str(caught.value)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/b.tar.gz", "is not encrypted"),
        ("https://user:s3cret@example.org/b.tar.gz", "has a password in it"),
        ("ftp://example.org/b.tar.gz", "is no URL to take policies from"),
        ("file:///etc/hosts", "is no URL to take policies from"),
        ("https:///b.tar.gz", "is no URL to take policies from"),
        ("https://[::1/b.tar.gz", "is no URL to take policies from"),
        ("https://example.org/a b.tar.gz", "is no URL to take policies from"),
    ],
)
def test_a_url_that_is_not_safe_is_refused_before_it_is_asked(url: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        BundleSource(BundleAddress(url=url))

    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_way_that_is_trusted_needs_no_encryption() -> None:
    BundleAddress(url="http://example.org/b.tar.gz", allow_http=True).check()


def test_a_digest_that_is_none_is_refused() -> None:
    with pytest.raises(PolicyError, match="64 digits"):
        BundleSource(BundleAddress(url="https://example.org/b.tar.gz", sha256="abc"))


def test_what_is_secret_in_a_url_is_not_shown() -> None:
    assert shown("https://me:pw@example.org/b.tar.gz?signature=abc#x") == "https://example.org/b.tar.gz"


def test_polls_slow_down_while_a_bundle_cannot_be_had(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "JITTER", 0.0)
    source = BundleSource(BundleAddress(url=host.url), seconds=10.0)
    delays = [source.delay_s()]
    for _ in range(4):
        refusal(source)
        delays.append(source.delay_s())
    host.publish(ONE)
    source.poll()

    assert [*delays, source.delay_s()] == [10.0, 20.0, 40.0, 60.0, 60.0, 10.0]
    assert BundleSource(BundleAddress(url=host.url), seconds=300.0).delay_s() == 300.0


def test_polls_of_many_servers_do_not_coincide() -> None:
    source = BundleSource(BundleAddress(url="https://example.org/b"), seconds=10.0)
    delays = {source.delay_s() for _ in range(50)}

    assert len(delays) > 10
    assert min(delays) >= 9.0
    assert max(delays) <= 11.0


def test_what_was_kept_is_private_and_read_by_the_other_processes(host: Host, tmp_path: Path) -> None:
    address = BundleAddress(url=host.url, cache=tmp_path / "cache")
    host.publish(ONE)
    texts, source = fetch_at_start(address)
    source.keep()
    host.publish(TWO)

    assert kept(address) == texts
    assert stat.S_IMODE(address.kept_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(address.kept_file.parent.stat().st_mode) == 0o700
    assert list(address.kept_file.parent.iterdir()) == [address.kept_file]


def test_another_node_fetches_what_it_has_not_kept(host: Host, tmp_path: Path) -> None:
    host.publish(ONE)
    address = BundleAddress(url=host.url, cache=tmp_path)

    assert files(kept(address)) == ["bundle.tar.gz/policies/one.yaml"]
    assert address.kept_file.exists()


def test_a_server_starts_from_what_it_kept_while_the_url_is_down(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = BundleAddress(url=host.url, cache=tmp_path)
    host.publish(ONE)
    fetch_at_start(address)[1].keep()
    host.status[PATH] = 500

    with caplog.at_level(logging.WARNING):
        texts, source = fetch_at_start(address)

    assert files(texts) == ["bundle.tar.gz/policies/one.yaml"]
    assert "answers 500" in caplog.text
    host.status.clear()
    assert source.poll() is not None


def test_a_server_whose_operator_chose_no_cache_does_not_start_while_the_url_is_down(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = BundleAddress(url=host.url)
    host.publish(ONE)
    fetch_at_start(address)[1].keep()
    assert address.kept_file.is_relative_to(tmp_path)
    host.status[PATH] = 500

    with pytest.raises(PolicyError, match="answers 500"):
        fetch_at_start(address)


def test_what_was_kept_is_not_taken_for_another_pin(host: Host, tmp_path: Path) -> None:
    host.publish(ONE)
    fetch_at_start(BundleAddress(url=host.url, cache=tmp_path))[1].keep()
    pinned = BundleAddress(url=host.url, cache=tmp_path, sha256=hashlib.sha256(TWO).hexdigest())
    host.status[PATH] = 500

    with pytest.raises(PolicyError, match="is not the bundle that bundle_sha256 pins"):
        fetch_at_start(pinned)


def test_a_cache_that_cannot_be_written_is_told(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    host.publish(ONE)
    source = fetch_at_start(BundleAddress(url=host.url, cache=tmp_path / "file"))[1]

    with pytest.raises(PolicyError, match="cannot be written"):
        source.keep()
