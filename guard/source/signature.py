"""Who published a bundle: an Ed25519 signature over its exact bytes, in one file with them.

The file is a DSSE envelope (Dead Simple Signing Envelope, as in-toto and Sigstore have it): JSON with
the bundle's bytes in base64 and signatures over those bytes and their kind. So bundle and signature
change places together, and nothing is unpacked before a known key has vouched for it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from guard.errors import GuardError
from guard.source.bundle import MAX_BUNDLE_BYTES
from guard.source.source import out_of_reach

PAYLOAD_TYPE: Final = "application/vnd.moe-guard.bundle.v1+gzip"
"""Signed with the bytes, so that a key's signature under a document of another kind is none here."""

MAX_SIGNED_BYTES: Final = MAX_BUNDLE_BYTES * 4 // 3 + (64 << 10)
MAX_SIGNATURES: Final = 16
MAX_KEY_BYTES: Final = 64 << 10
_PEM_PUBLIC: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class PolicyKeyError(GuardError):
    """A file of keys for bundles is not what it must be."""


class _Signature(msgspec.Struct):
    sig: str
    keyid: str = ""  # a hint for people; any known key may have signed


class _Envelope(msgspec.Struct, rename={"payload_type": "payloadType"}):
    payload_type: str
    payload: str
    signatures: list[_Signature]


@dataclass(frozen=True, slots=True)
class PolicyKeys:
    """The public keys of those who may publish policies; one signature of one of them is enough."""

    keys: tuple[Ed25519PublicKey, ...]

    @staticmethod
    def read(path: Path) -> PolicyKeys:
        """One or more public keys in PEM, one behind the other. Raises PolicyKeyError."""
        content = _key_file(path)
        if b"PRIVATE KEY" in content:
            raise PolicyKeyError(
                f"{path} holds a private key, which belongs to who publishes bundles; give the server "
                "the public one"
            )
        return PolicyKeys(
            tuple(_public_key(match[0], path) for match in _PEM_PUBLIC.finditer(content))
        )._checked(path)

    def _checked(self, path: Path) -> PolicyKeys:
        if not self.keys:
            raise PolicyKeyError(f"{path} holds no public key in PEM; `moe-guard bundle key` makes one")
        return self

    def payload(self, signed: bytes, name: str) -> bytes:
        """The bundle that one of the keys signed. name: what faults call it

        Raises PolicyError for anything else.
        """
        envelope = _envelope(signed, name)
        payload = _decoded(envelope.payload, name)
        message = _message(payload)
        for signature in envelope.signatures:
            given = _decoded(signature.sig, name)
            if any(_is_signed(key, given, message) for key in self.keys):
                return payload
        known = ", ".join(key_id(key) for key in self.keys)
        by = ", ".join(ascii(one.keyid[:64]) for one in envelope.signatures) or "nobody"
        raise out_of_reach(
            name, f"is not signed by a key of policy_key ({known}), but by {by}; it was not taken"
        )


def is_signed(content: bytes) -> bool:
    """Whether it looks like an envelope; an archive begins otherwise."""
    return content[:1] == b"{"


def sign(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The bundle and its signature in one file's bytes; equal for equal arguments."""
    signature = _Signature(
        base64.b64encode(key.sign(_message(payload))).decode(), key_id(key.public_key())
    )
    envelope = _Envelope(PAYLOAD_TYPE, base64.b64encode(payload).decode(), [signature])
    return msgspec.json.encode(envelope) + b"\n"


def key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises PolicyKeyError, which quotes nothing of it."""
    try:
        key = load_pem_private_key(_key_file(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PolicyKeyError(f"{path} is no unencrypted private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise PolicyKeyError(f"{path} is no Ed25519 key; `moe-guard bundle key` makes one")
    return key


def write_new_keys(path: Path) -> tuple[Path, str]:
    """A new private key at `path`, its owner's alone, and the public one beside it.

    Returns the public one's file, and its id. Raises PolicyKeyError where there is a file already.
    """
    key = Ed25519PrivateKey.generate()
    public = path.with_name(path.name + ".pub")
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for file, content, mode in ((path, private_pem, 0o600), (public, public_pem, 0o644)):
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise PolicyKeyError(f"{file} cannot be made: {error.strerror}") from error
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
    return public, key_id(key.public_key())


def _message(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of the bytes and their kind."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _envelope(signed: bytes, name: str) -> _Envelope:
    if len(signed) > MAX_SIGNED_BYTES:
        raise out_of_reach(name, f"the bundle is larger than {MAX_BUNDLE_BYTES} bytes")
    if not is_signed(signed):
        raise out_of_reach(
            name, "is not signed, and policy_key takes nothing else; `moe-guard bundle build --sign`"
        )
    try:
        envelope = msgspec.json.decode(signed, type=_Envelope)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise out_of_reach(name, f"is no signed bundle: {error}") from error
    if envelope.payload_type != PAYLOAD_TYPE:
        kind = ascii(envelope.payload_type[:80])
        raise out_of_reach(name, f"is signed, but of the kind {kind}, not {PAYLOAD_TYPE}")
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise out_of_reach(name, f"has more than {MAX_SIGNATURES} signatures")
    return envelope


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise out_of_reach(name, f"is no signed bundle: {error}") from error


def _is_signed(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _public_key(pem: bytes, path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PolicyKeyError(f"{path} holds a public key that cannot be read") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PolicyKeyError(f"{path} holds a key that is not Ed25519's; bundles are signed with those")
    return key


def _key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise PolicyKeyError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_KEY_BYTES:
        raise PolicyKeyError(f"{path} is larger than {MAX_KEY_BYTES} bytes, too many for keys")
    return content
