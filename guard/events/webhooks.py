"""Who is told of decisions over HTTP: a YAML file of URLs, and what each of them wants to hear of."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from guard.errors import GuardError
from guard.events.message import Decision
from guard.policy import Fault
from guard.policy.explain import explain
from guard.policy.model import Severity
from guard.policy.nodes import ListNode, MapNode, Node, plain
from guard.policy.spec import Problem, Spec, word
from guard.policy.suggest import one_of
from guard.policy.yaml12 import MAX_FILE_BYTES, read_documents

MAX_WEBHOOKS: Final = 16
"""Each has a thread and a queue of its own."""

_LOCAL: Final = ("localhost", "127.0.0.1", "::1")
_SEVERITIES: Final = tuple(str(severity) for severity in Severity)


class WebhookError(GuardError):
    """The file of webhooks is not what it must be."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A receiver. Neither its URL nor its token is ever shown: many have a secret in their path.

    policies: only decisions of these; None: of all
    token: for `Authorization: Bearer`; None: without
    """

    url: str
    min_severity: Severity = Severity.INFO
    policies: frozenset[str] | None = None
    token: str | None = None

    @property
    def host(self) -> str:
        """What logs call it."""
        return urllib.parse.urlsplit(self.url).hostname or ""

    def wants(self, decision: Decision) -> bool:
        if self.policies is not None and decision.policy not in self.policies:
            return False
        return Severity(decision.severity).rank >= self.min_severity.rank


class WebhookSpec(Spec):
    """An item of the file."""

    model_config = ConfigDict(alias_generator=None)
    HINTS: ClassVar[Mapping[str, str]] = {
        "token": "a token does not stand in the file: name the environment variable that holds it, "
        "token_variable: NAME"
    }

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    min_severity: Annotated[str, BeforeValidator(word(_SEVERITIES))] = Severity.INFO.value
    policies: Annotated[tuple[str, ...], Field(min_length=1, max_length=1024)] | None = None
    send_resolved: bool = False
    token_variable: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    allow_http: bool = False

    @classmethod
    def problems(cls, data: Mapping[object, object]) -> Iterator[Problem]:
        url = data.get("url")
        if isinstance(url, str) and (fault := _url_fault(url, is_open=data.get("allow_http") is True)):
            yield Problem(("url",), fault)
        if data.get("send_resolved") is True:
            text = "a decision is over when it is made, so there is nothing to resolve; leave it false"
            yield Problem(("send_resolved",), text)
        variable = data.get("token_variable")
        if isinstance(variable, str) and (fault := _token_fault(variable)):
            yield Problem(("token_variable",), fault)


def read_webhooks(path: Path) -> tuple[Webhook, ...]:
    """Raises WebhookError with all faults; it shows no URL and no token."""
    try:
        content = path.read_bytes()[: MAX_FILE_BYTES + 1]
        text = content.decode()
    except OSError as error:
        raise WebhookError(f"the webhooks {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise WebhookError(f"the webhooks {path} are no UTF-8 text") from None
    if len(content) > MAX_FILE_BYTES:
        raise WebhookError(f"{path} has more than {MAX_FILE_BYTES} bytes, too many for webhooks")
    roots, faults = read_documents(text, str(path))
    if faults:
        # A fault of YAML may quote what stands there, and that may be a secret.
        raise WebhookError(f"{faults[0].location}: not readable as YAML, or a key is there twice")
    if len(roots) != 1 or not isinstance(roots[0], ListNode):
        raise WebhookError(
            f"{path}: expected a list, an item for each webhook: - url: https://HOST/PATH"
        )
    items = roots[0].items
    if len(items) > MAX_WEBHOOKS:
        raise WebhookError(f"{path}: has {len(items)} webhooks, but at most {MAX_WEBHOOKS} are served")
    found: list[Webhook] = []
    wrong: list[Fault] = []
    for item in items:
        built = _built(item)
        if isinstance(built, Webhook):
            found.append(built)
        else:
            wrong += built
    if wrong:
        raise WebhookError("\n".join(str(fault) for fault in sorted(wrong)))
    return tuple(found)


def _built(item: Node) -> Webhook | list[Fault]:
    if not isinstance(item, MapNode):
        return [
            Fault(item.location, "expected a mapping: url: https://HOST/PATH, and what else it needs")
        ]
    for key, entry in item.entries.items():
        if not (isinstance(key, str) and key.isidentifier()):  # it may be a URL, and is not shown
            known = one_of(WebhookSpec.key_names())
            return [Fault(entry.key_location, f"unknown key; expected {known}")]
    try:
        spec = WebhookSpec.model_validate(plain(item))
    except ValidationError as error:
        return explain(error, item)
    return Webhook(
        url=spec.url,
        min_severity=Severity(spec.min_severity),
        policies=None if spec.policies is None else frozenset(spec.policies),
        token=None if spec.token_variable is None else os.environ[spec.token_variable].strip(),
    )


def _url_fault(url: str, *, is_open: bool) -> str | None:
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # such as a broken IPv6 address
        host = None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if host is None or parts.scheme not in ("https", "http") or not is_plain:
        return "is no URL to send decisions to; give https://HOST/PATH"
    if "@" in parts.netloc:
        return "has a password in it; use token_variable"
    if parts.scheme == "http" and host not in _LOCAL and not is_open:
        return "is not encrypted; use https, or set allow_http: true where the way is trusted"
    return None


def _token_fault(variable: str) -> str | None:
    token = os.environ.get(variable, "").strip()
    if not token:
        return f"the environment variable {variable} holds no token"
    if not (token.isascii() and token.isprintable()):
        return f"the token in {variable} has characters that no header takes"
    return None
