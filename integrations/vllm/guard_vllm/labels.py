"""Labels of requests: what they may be, and how an operator's headers and API keys give them."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from guard.errors import GuardError
from guard.policy.nodes import Entry, MapNode, Node, ScalarNode
from guard.policy.yaml12 import MAX_FILE_BYTES, read_documents

logger = logging.getLogger(__name__)

MAX_LABELS = 32
MAX_NAME_CHARACTERS = 64
MAX_VALUE_CHARACTERS = 256

_DIGEST_KEY = re.compile(r"sha256:([0-9a-fA-F]{64})")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, a token
_AUTHORIZATION = b"authorization"


class LabelError(GuardError):
    """Labels, or a source of them, are not what they must be. Over HTTP it is a 400."""


def check_labels(labels: object) -> dict[str, str]:
    """Raises LabelError for anything but a few short texts by name."""
    if not isinstance(labels, Mapping):
        raise LabelError(f"labels: expected a mapping of names to texts, found {type(labels).__name__}")
    if len(labels) > MAX_LABELS:
        raise LabelError(f"labels: {len(labels)} are too many; give at most {MAX_LABELS}")
    for name, value in labels.items():
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS):
            raise LabelError(
                f"labels: {str(name)[:MAX_NAME_CHARACTERS]!r} is no name; a name is a text of 1 to "
                f"{MAX_NAME_CHARACTERS} characters"
            )
        if not (isinstance(value, str) and len(value) <= MAX_VALUE_CHARACTERS):
            raise LabelError(
                f"labels.{name}: a value is a text of at most {MAX_VALUE_CHARACTERS} characters"
            )
    return dict(labels)


@dataclass(frozen=True, slots=True)
class ApiKeyLabels:
    """Labels by the SHA-256 of the API key that they are for; no key itself is kept."""

    by_digest: Mapping[bytes, Mapping[str, str]]

    def of(self, token: bytes) -> Mapping[str, str]:
        """Compared with every key, so that the time taken does not tell how far one was guessed."""
        digest, found = hashlib.sha256(token).digest(), {}
        for known, labels in self.by_digest.items():
            if hmac.compare_digest(known, digest):
                found = dict(labels)
        return found

    @staticmethod
    def read(path: Path) -> ApiKeyLabels:
        """A YAML or JSON file that maps API keys, or better `sha256:` and their digest, to labels.

        Raises LabelError, which says where but never quotes a key.
        """
        try:
            mode = path.stat().st_mode
            text = path.read_bytes()[: MAX_FILE_BYTES + 1].decode()
        except OSError as error:
            raise LabelError(f"the API keys' labels {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:  # which would quote what it could not read
            raise LabelError(f"the API keys' labels {path} are no UTF-8 text") from None
        if len(text.encode()) > MAX_FILE_BYTES:
            raise LabelError(f"{path} has more than {MAX_FILE_BYTES} bytes, too many for API keys")
        if mode & stat.S_IROTH:
            logger.warning(
                "MoE Guard: everybody on this machine can read the API keys' labels %s; restrict it: "
                "chmod 600",
                path,
            )
        roots, faults = read_documents(text, str(path))
        for fault in faults:
            raise LabelError(f"{fault.location}: not readable as YAML or JSON, or a key is there twice")
        if len(roots) != 1 or not isinstance(roots[0], MapNode):
            raise LabelError(f"{path}: expected one mapping of API keys to their labels")
        entries = roots[0].entries
        by_digest = dict(_key_labels(key, entry) for key, entry in entries.items())
        if len(by_digest) < len(entries):
            raise LabelError(f"{path}: an API key is there twice, once by its digest; keep one of them")
        return ApiKeyLabels(by_digest)


def _key_labels(key: object, entry: Entry) -> tuple[bytes, dict[str, str]]:
    if not isinstance(key, str) or not key:
        raise LabelError(f"{entry.key_location}: an API key is a text; write it in quotes")
    match = _DIGEST_KEY.fullmatch(key)
    if match is None and key.startswith("sha256:"):
        raise LabelError(f"{entry.key_location}: sha256: is followed by 64 hexadecimal digits")
    digest = hashlib.sha256(key.encode()).digest() if match is None else bytes.fromhex(match[1])
    return digest, _labels(entry.node)


def _labels(node: Node) -> dict[str, str]:
    if not isinstance(node, MapNode):
        raise LabelError(f"{node.location}: expected a mapping of labels, for example {{tenant: acme}}")
    values = {}
    for name, (_, value) in node.entries.items():
        if not isinstance(value, ScalarNode) or not isinstance(value.value, str):
            raise LabelError(f"{value.location}: a label's value is a text; write it in quotes")
        values[name] = value.value
    try:
        return check_labels(values)
    except LabelError as error:
        raise LabelError(f"{node.location}: {error}") from error


@dataclass(frozen=True, slots=True)
class LabelSources:
    """Where the labels of an HTTP request come from.

    headers: label -> name of its header, in lower case
    keys: what an `Authorization: Bearer` token says; it wins over a header
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    keys: ApiKeyLabels | None = None

    @staticmethod
    def of_settings(headers: Mapping[str, str] | None, keys: str | None) -> LabelSources:
        """Raises LabelError."""
        named = check_labels(headers or {})
        for label, header in named.items():
            if not _HEADER_NAME.fullmatch(header):
                raise LabelError(f"label_headers.{label}: {header!r} is no name of a header")
            if header.lower().encode() in (_AUTHORIZATION, b"cookie"):
                raise LabelError(
                    f"label_headers.{label}: {header!r} holds a secret, which is no label; for labels "
                    "by API key there is api_key_labels"
                )
        lowered = {label: header.lower() for label, header in named.items()}
        return LabelSources(lowered, None if keys is None else ApiKeyLabels.read(Path(keys)))

    def labels_of(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
        """headers: as ASGI has them, names in lower case.

        Raises LabelError for a header that is there twice: which of them a proxy checked is not known.
        """
        values: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for name, value in headers:
            values[name.lower()].append(value)
        found: dict[str, str] = {}
        for label, header in self.headers.items():
            text = _only(header, values.get(header.encode(), [])).decode("latin-1")
            if not text.isprintable():
                raise LabelError(f"the header {header!r} has characters that no label has")
            if text:
                found[label] = text
        if self.keys is not None:
            authorization = _only("authorization", values.get(_AUTHORIZATION, []))
            scheme, _, token = authorization.partition(b" ")
            if scheme.lower() == b"bearer":
                found |= self.keys.of(token.strip())
        return check_labels(found)


def _only(name: str, values: list[bytes]) -> bytes:
    if len(values) > 1:
        raise LabelError(f"the header {name!r} is there {len(values)} times; send it once")
    return values[0].strip() if values else b""


NO_LABELS = LabelSources()
"""Nothing gives an HTTP request a label."""
