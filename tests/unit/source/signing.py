"""Keys of publishers, and bundles that they signed."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from guard.source.signature import PolicyKeys, sign
from tests.unit.source.writing import archive, member

OWN = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
KEYS = PolicyKeys((OWN.public_key(),))


def pem(*keys: Ed25519PrivateKey) -> bytes:
    return b"".join(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in keys
    )


def key_file(folder: Path, *keys: Ed25519PrivateKey) -> Path:
    path = folder / "keys.pem"
    path.write_bytes(pem(*keys))
    return path


def numbered(serial: int, **texts: str) -> bytes:
    """An archive with a serial; each keyword a file policies/NAME.yaml."""
    files = [member(f"policies/{name}.yaml", text) for name, text in texts.items()]
    return archive(member(".manifest", f'{{"serial":{serial}}}'), *files)


def signed(serial: int, *, key: Ed25519PrivateKey = OWN, **texts: str) -> bytes:
    return sign(numbered(serial, **texts), key)
