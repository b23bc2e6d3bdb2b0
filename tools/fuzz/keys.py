"""Files that operators write beside a server: admin keys, labels by API key, webhooks, public keys, the
key of the decision log. No error quotes a key, a token or a webhook's URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from guard_vllm.admin.keys import ROLES, AdminKeyError, AdminKeys
from guard_vllm.labels import MAX_LABELS, ApiKeyLabels, LabelError, check_labels
from hypothesis import strategies as st

from guard.errors import GuardError
from guard.events.log.key import LogKeyError, make_key_files, read_key
from guard.events.webhooks import WebhookError, read_webhooks
from guard.source.signature import PolicyKeyError, PolicyKeys
from tools.fuzz.mutation import mostly, mutated
from tools.fuzz.part import Part, Parts

SECRET: Final = "s3cret-of-alice"
"""Stands in every file, and in no error."""

_DIGEST: Final = "sha256:" + "0f" * 32
_ADMIN: Final = f"{SECRET}: {{name: alice, role: admin}}\n{_DIGEST}: {{name: bob, role: viewer}}\n"
_LABELS: Final = f'{{"{SECRET}": {{"tenant": "acme", "tier": "free"}}, "{_DIGEST}": {{}}}}\n'
_WEBHOOKS: Final = f"""\
- url: https://hooks.example/{SECRET}
  min_severity: high
  policies: [a, b]
- {{url: "http://127.0.0.1:8080/x", send_resolved: false}}
- url: http://inside.example/{SECRET}
  allow_http: true
"""
_WORDS: Final = (
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!str ",
        b"? [1]",
        b"~",
        b"- ",
        b": ",
        b"'",
        b"\t",
        b"{}",
        b"[]",
        b"---\n",
    ),
    *(
        b"sha256:",
        b"sha256:00",
        b"name: ",
        b"role: admin",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b'"\\ud800"',
    ),
    *(
        b"https://[::1",
        b"https://a@b/",
        b"https://x:99999/",
        b"file:///etc/passwd",
        b"token_variable: HOME\n",
    ),
    *(b"token_variable: NONE\n", b"token: x\n", SECRET.encode(), b"allow_http: true\n", b"[" * 70),
)


def parts(folder: Path) -> Parts:
    path = folder / "file"
    pems = [_public_pem(number) for number in range(2)]
    key_path = folder / "log.key"
    make_key_files(key_path)
    log_key = key_path.read_bytes()

    def read_admin(_: Path) -> None:
        keys = AdminKeys.read(path).keys.by_digest
        assert keys
        assert all(labels["role"] in ROLES and labels["name"] for labels in keys.values())
        assert all(len(digest) == 32 for digest in keys)

    def read_labels(_: Path) -> None:
        for labels in ApiKeyLabels.read(path).by_digest.values():
            assert len(check_labels(labels)) <= MAX_LABELS

    def read_hooks(_: Path) -> None:
        for hook in read_webhooks(path):
            assert hook.host
            assert hook.url.startswith(("https://", "http://"))
            assert SECRET not in hook.host

    def read_public(_: Path) -> None:
        assert PolicyKeys.read(path).keys

    def read_log_key(_: Path) -> None:
        key = read_key(path)
        assert len(key.key) == 32, "it is no key of this length"
        assert key.head.n >= 0

    def part(
        samples: Sequence[bytes], reader: Callable[[Path], None], *errors: type[Exception]
    ) -> Part[Any]:
        whole = mutated(samples, _WORDS, most=2)
        return Part(
            mostly(whole, st.binary(max_size=40)),
            lambda content: _read(path, content, reader),
            errors,
            lambda: sorted(one.name for one in folder.iterdir() if one != path),
        )

    return {
        "admin keys": part([_ADMIN.encode()], read_admin, AdminKeyError, LabelError),
        "labels": part([_LABELS.encode()], read_labels, LabelError),
        "webhooks": part([_WEBHOOKS.encode()], read_hooks, WebhookError),
        "public keys": part([pems[0], pems[0] + pems[1]], read_public, PolicyKeyError),
        "log key": part([log_key], read_log_key, LogKeyError),
    }


def _read(path: Path, content: bytes, reader: Callable[[Path], None]) -> None:
    path.touch(0o600)
    path.write_bytes(content)
    try:
        reader(path)
    except GuardError as error:
        _check_secrecy(error)
        raise


def _check_secrecy(error: GuardError) -> None:
    assert SECRET not in str(error), "a secret is quoted"


def _public_pem(number: int) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
