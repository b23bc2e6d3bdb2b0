"""Signed bundles where they come from: a URL or a file; what was refused leaves the old set."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from guard.failures import Failures
from guard.policy import PolicyError, load_texts
from guard.source.remote import BundleAddress, BundleSource, fetch_at_start, kept
from guard.source.signature import sign
from guard.source.watcher import PolicyWatcher
from tests.unit.source.signing import KEYS, OTHER, OWN, numbered, signed
from tests.unit.source.test_remote import PATH, Host, files, host, refusal
from tests.unit.source.test_watcher import Engines
from tests.unit.source.writing import archive, bundle, member, policy

__all__ = ["host"]  # a fixture

ONE = signed(1, one=policy("one"))
TWO = signed(2, two=policy("two"))


@pytest.fixture
def address(host: Host, tmp_path: Path) -> BundleAddress:
    return BundleAddress(url=host.url, cache=tmp_path / "cache", state=tmp_path / "state", keys=KEYS)


def test_a_signed_bundle_needs_no_checksum_beside_it(host: Host, address: BundleAddress) -> None:
    host.documents = {PATH: ONE}
    source = BundleSource(address)

    assert files(source.poll()) == ["bundle.tar.gz/policies/one.yaml"]
    assert source.poll() is None
    assert {path for path, _, _ in host.asked} == {PATH}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bundle(two=policy("two")), "is not signed"),
        (signed(2, key=OTHER, two=policy("two")), "is not signed by a key of policy_key"),
        (TWO.replace(b'"sig":"', b'"sig":"AAAA'), "is not signed by a key"),
        (TWO[:-20], "is no signed bundle"),
    ],
    ids=["unsigned", "wrong key", "damaged", "cut off"],
)
def test_nothing_but_what_a_known_key_signed_is_taken_and_each_refusal_counts(
    host: Host, address: BundleAddress, content: bytes, message: str
) -> None:
    host.documents = {PATH: ONE}
    engines = Engines("")
    watcher = PolicyWatcher(BundleSource(address), engines.apply, lambda: engines.revision, Failures())
    watcher.turn()
    good = engines.revision
    host.publish(content)  # with a checksum, which is not asked for
    watcher.turn()
    watcher.turn()

    assert engines.revision == good
    assert [message in one for one in engines.refusals] == [True]
    host.documents = {PATH: TWO}
    watcher.turn()
    assert engines.revision != good


def test_a_signed_bundle_is_not_taken_unseen_where_no_key_is_named(host: Host) -> None:
    host.publish(ONE)
    assert "say with policy_key by whom" in refusal(BundleSource(BundleAddress(url=host.url)))


def test_a_signed_bundle_without_a_serial_is_refused(host: Host, address: BundleAddress) -> None:
    for content, message in (
        (bundle(a=policy("a")), "has no .manifest with a serial"),
        (numbered(0, a=policy("a")), "serial is 0; it must be 1 to"),
        (numbered(1 << 60, a=policy("a")), "it must be 1 to"),
    ):
        host.documents = {PATH: sign(content, OWN)}
        assert message in refusal(BundleSource(address))


def test_an_older_bundle_is_refused_after_a_restart_too_and_let_where_it_may(
    host: Host, address: BundleAddress
) -> None:
    host.documents = {PATH: TWO}
    fetch_at_start(address)[1].keep()
    host.documents = {PATH: ONE}

    assert "has serial 1, older than 2" in refusal(BundleSource(address))
    texts, _ = fetch_at_start(address)  # which starts with its last one
    assert files(texts) == ["bundle.tar.gz/policies/two.yaml"]
    with pytest.raises(PolicyError, match="older than 2"):
        fetch_at_start(replace(address, cache=None))
    back, source = fetch_at_start(replace(address, allow_rollback=True))
    assert files(back) == ["bundle.tar.gz/policies/one.yaml"]
    source.keep()
    assert files(kept(address)) == ["bundle.tar.gz/policies/one.yaml"]


def test_a_newer_bundle_of_the_policies_in_force_moves_the_order_on(
    host: Host, address: BundleAddress
) -> None:
    host.documents = {PATH: ONE}
    texts, source = fetch_at_start(address)
    source.keep()
    revision = load_texts(texts).revision
    watcher = PolicyWatcher(source, unasked, lambda: revision, Failures())
    host.documents = {PATH: signed(3, one=policy("one"))}

    watcher.turn(is_asked=True)

    host.documents = {PATH: TWO}
    assert "has serial 2, older than 3" in refusal(source)


def unasked(load: object) -> NoReturn:
    raise AssertionError("it is in force already")


def test_without_a_state_folder_the_order_holds_while_the_server_runs(
    host: Host, address: BundleAddress
) -> None:
    stateless = replace(address, state=None)
    host.documents = {PATH: TWO}
    fetch_at_start(stateless)[1].keep()  # in the process that starts the server
    host.documents = {PATH: ONE}
    watching = BundleSource(stateless)  # in the one that watches
    watching.resume()

    assert "older than 2" in refusal(watching)
    assert files(BundleSource(stateless).poll()) == ["bundle.tar.gz/policies/one.yaml"]


def test_what_was_kept_is_verified_again(host: Host, address: BundleAddress) -> None:
    host.documents = {PATH: TWO}
    fetch_at_start(address)[1].keep()
    address.kept_file.write_bytes(signed(3, key=OTHER, evil=policy("evil")))
    with pytest.raises(PolicyError, match="is not signed by a key"):
        kept(address)
    address.kept_file.write_bytes(ONE)
    with pytest.raises(PolicyError, match="older than 2"):
        kept(address)


def test_a_pin_holds_for_a_signed_bundle_too(host: Host, address: BundleAddress) -> None:
    host.documents = {PATH: ONE}
    digest = hashlib.sha256(ONE).hexdigest()

    assert BundleSource(replace(address, sha256=digest)).poll() is not None
    assert "has the SHA-256" in refusal(BundleSource(replace(address, sha256="0" * 64)))


def test_a_signed_bundle_in_a_file_is_swapped_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "policies.json"
    file.write_bytes(ONE)
    source = BundleSource(BundleAddress(url=str(file), cache=tmp_path / "cache", keys=KEYS))

    assert files(source.poll()) == ["policies.json/policies/one.yaml"]
    source.keep()
    assert source.poll() is None
    (tmp_path / "next").write_bytes(TWO)
    os.replace(tmp_path / "next", file)
    assert files(source.poll()) == ["policies.json/policies/two.yaml"]
    source.keep()
    file.write_bytes(ONE)
    assert "older than 2" in refusal(source)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "large"])
def test_what_is_no_file_with_a_signed_bundle_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "b"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as stream:
            stream.truncate(1 << 30)
    message = {"missing": "No such file", "large": "is larger than"}.get(kind, "is no regular file")

    assert message in refusal(BundleSource(BundleAddress(url=str(path), keys=KEYS)))


def test_a_digest_behind_the_url_is_a_pin() -> None:
    digest = "a" * 64
    assert BundleAddress.pinned(f"https://h/b?v=1#sha256={digest}") == ("https://h/b?v=1", digest)
    assert BundleAddress.pinned("https://h/b") == ("https://h/b", None)
    for wrong in ("#", "#sha256=", f"#sha256={digest}0", f"#sha512={digest}", f"#{digest}"):
        with pytest.raises(PolicyError, match="behind its # stands no sha256="):
            BundleAddress.pinned(f"https://h/b{wrong}")


def test_the_archive_in_it_is_read_as_strictly_as_any(address: BundleAddress) -> None:
    evil = archive(
        member(".manifest", '{"serial": 1}'),
        member("b.yaml", type=tarfile.SYMTYPE, linkname="/etc/hosts"),
    )
    with pytest.raises(PolicyError, match="no plain file"):
        load_texts(address.opened(sign(evil, OWN)).texts)
