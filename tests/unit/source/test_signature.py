"""A signed bundle is taken for the bytes that a known key signed, and for nothing else."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from guard.policy import PolicyError
from guard.source import signature
from guard.source.signature import (
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    PolicyKeyError,
    PolicyKeys,
    key_id,
    read_private_key,
    sign,
    write_new_keys,
)
from tests.unit.source.signing import KEYS, OTHER, OWN, key_file, numbered, pem
from tests.unit.source.writing import policy

PAYLOAD = numbered(1, a=policy("a"))
SIGNED = sign(PAYLOAD, OWN)


def refusal(content: bytes, keys: PolicyKeys = KEYS) -> str:
    with pytest.raises(PolicyError) as caught:
        keys.payload(content, "b")
    return str(caught.value)


def changed(**values: Any) -> bytes:
    return json.dumps({**json.loads(SIGNED), **values}).encode()


def test_what_a_key_signed_is_given_back_as_it_was() -> None:
    assert KEYS.payload(SIGNED, "b") == PAYLOAD
    assert sign(PAYLOAD, OWN) == SIGNED


def test_the_signature_is_dsses_over_the_exact_bytes() -> None:
    """By the text of the specification, so that other tools can sign and verify."""
    envelope = json.loads(SIGNED)
    kind = PAYLOAD_TYPE.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(PAYLOAD), PAYLOAD)

    assert envelope["payloadType"] == PAYLOAD_TYPE
    assert base64.b64decode(envelope["payload"]) == PAYLOAD
    [one] = envelope["signatures"]
    OWN.public_key().verify(base64.b64decode(one["sig"]), message)
    assert one["keyid"] == key_id(OWN.public_key())


def test_any_of_several_keys_may_have_signed_and_any_signature_of_several_is_enough(
    tmp_path: Path,
) -> None:
    both = PolicyKeys.read(key_file(tmp_path, OTHER, OWN))
    other = json.loads(sign(PAYLOAD, OTHER))["signatures"]

    assert both.payload(SIGNED, "b") == both.payload(sign(PAYLOAD, OTHER), "b") == PAYLOAD
    assert KEYS.payload(changed(signatures=other + json.loads(SIGNED)["signatures"]), "b") == PAYLOAD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PAYLOAD, "is not signed, and policy_key takes nothing else"),
        (b"", "is not signed"),
        (b"{}", "is no signed bundle: "),
        (b'{"payloadType": 1}', "is no signed bundle: "),
        (b"{" * 100_000, "is no signed bundle: "),
        (b'{"a": "\xff"}', "is no signed bundle: "),
        (changed(signatures=[]), "but by nobody"),
        (changed(signatures=json.loads(SIGNED)["signatures"] * (MAX_SIGNATURES + 1)), "more than 16"),
        (changed(payloadType="application/json"), "of the kind 'application/json'"),
        (changed(payload="%%%"), "is no signed bundle: "),
        (changed(payload=base64.b64encode(numbered(2, a=policy("a"))).decode()), "is not signed by"),
        (changed(signatures=[{"sig": "AAAA", "keyid": "x\n"}]), r"but by 'x\n'"),
        (changed(signatures=[{"sig": "", "keyid": key_id(OWN.public_key())}]), "is not signed by"),
        (sign(PAYLOAD, OTHER), f"but by '{key_id(OTHER.public_key())}'"),
    ],
    ids=[
        *("unsigned", "empty", "no envelope", "wrong type", "nested", "no UTF-8", "no signature"),
        *("many", "kind", "no base64", "another's signature", "short", "named only", "wrong key"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    assert message in refusal(content)


def test_a_signature_under_a_document_of_another_kind_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(signature, "PAYLOAD_TYPE", "application/other")
        other = json.loads(sign(PAYLOAD, OWN))["signatures"]
    assert "is not signed by a key" in refusal(changed(signatures=other))


def test_a_signed_bundle_is_measured_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "MAX_SIGNED_BYTES", 100)
    assert "is larger than" in refusal(SIGNED)


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_no_byte_of_it_can_be_changed_to_another_bundle(place: int, difference: int) -> None:
    damaged = bytearray(SIGNED)
    damaged[place] ^= difference
    try:
        taken = KEYS.payload(bytes(damaged), "b")
    except PolicyError:
        return
    assert taken == PAYLOAD, "a byte of what is only said, such as the key's id"


def test_what_openssl_makes_are_keys(tmp_path: Path) -> None:
    private, public = tmp_path / "k", tmp_path / "k.pub"
    for command in (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(private)],
        ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    assert PolicyKeys.read(public).payload(sign(PAYLOAD, read_private_key(private)), "b") == PAYLOAD


def test_new_keys_fit_and_the_private_one_is_its_owners_alone(tmp_path: Path) -> None:
    public, identity = write_new_keys(tmp_path / "k")
    private = read_private_key(tmp_path / "k")

    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert identity == key_id(private.public_key())
    assert PolicyKeys.read(public).payload(sign(PAYLOAD, private), "b") == PAYLOAD
    with pytest.raises(PolicyKeyError, match="cannot be made: File exists"):
        write_new_keys(tmp_path / "k")
    assert read_private_key(tmp_path / "k").private_bytes_raw() == private.private_bytes_raw()


EC = generate_private_key(SECP256R1())
EC_PUBLIC = EC.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
EC_PRIVATE = EC.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PRIVATE = OWN.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
LOCKED = OWN.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"s3cret"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no public key"),
        (b"no key", "holds no public key"),
        (PRIVATE, "holds a private key"),
        (pem(OWN) + PRIVATE, "holds a private key"),
        (EC_PUBLIC, "not Ed25519's"),
        (pem(OWN) + EC_PUBLIC, "not Ed25519's"),
        (pem(OWN).replace(b"MCow", b"!!!!"), "cannot be read"),
        (b" " * (65 << 10), "is larger than"),
    ],
    ids=["empty", "text", "private", "private behind", "other", "other behind", "broken", "large"],
)
def test_a_file_of_public_keys_that_is_none_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(PolicyKeyError, match=message):
        PolicyKeys.read(tmp_path / "k")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no key", "is no unencrypted private key"),
        (pem(OWN), "is no unencrypted private key"),
        (LOCKED, "is no unencrypted private key"),
        (EC_PRIVATE, "is no Ed25519 key"),
    ],
    ids=["text", "public", "encrypted", "other"],
)
def test_a_private_key_that_is_none_is_refused_and_not_quoted(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(PolicyKeyError, match=message) as caught:
        read_private_key(tmp_path / "k")
    assert content.decode()[-60:] not in str(caught.value)


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyKeyError, match="none cannot be read: No such file"):
        PolicyKeys.read(tmp_path / "none")
