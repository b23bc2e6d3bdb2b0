"""The file of webhooks: what it may say, and that its faults show no secret."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from guard.events.webhooks import MAX_WEBHOOKS, Webhook, WebhookError, read_webhooks
from guard.policy.model import Severity
from tests.unit.events.reports import decision


def read(folder: Path, text: str) -> tuple[Webhook, ...]:
    path = folder / "webhooks.yaml"
    path.write_text(text)
    return read_webhooks(path)


def test_everything_that_a_webhook_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", " s3cret \n")

    found = read(
        tmp_path,
        "- {url: https://hooks.example.org/a, min_severity: high, policies: [p, q],\n"
        "   send_resolved: false, token_variable: HOOK_TOKEN}\n"
        "- url: http://127.0.0.1:9/b\n"
        "- {url: http://plain.example.org, allow_http: true}\n",
    )

    assert found == (
        Webhook("https://hooks.example.org/a", Severity.HIGH, frozenset({"p", "q"}), "s3cret"),
        Webhook("http://127.0.0.1:9/b"),
        Webhook("http://plain.example.org"),
    )
    assert found[0].host == "hooks.example.org"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{}", ":1:3: .*'?url"),
        ("{ulr: https://a}", "did you mean 'url'"),
        ("{url: ftp://a/SECRET}", "1:9: url: is no URL to send decisions to"),
        ("{url: 'https://[a/SECRET'}", "is no URL"),
        ("{url: 'https://a:x/SECRET'}", "is no URL"),
        ("{url: https://me:SECRET@a}", "token_variable"),
        ("{url: http://a/SECRET}", "not encrypted; use https, or set allow_http"),
        ("{url: https://a, min_severity: hihg}", "did you mean 'high'"),
        ("{url: https://a, policies: []}", "at least 1"),
        ("{url: https://a, send_resolved: true}", "nothing to resolve"),
        ("{url: https://a, token: SECRET}", "token_variable: NAME"),
        ("{url: https://a, token_variable: HOOK_NONE}", "HOOK_NONE holds no token"),
        ("{url: https://a, allow_http: maybe}", "allow_http|true"),
        ("https://a/SECRET", "expected a mapping: url"),
        ("{https://a/SECRET: 1}", "unknown key; expected url, "),
    ],
)
def test_a_fault_is_told_at_its_place_and_no_secret_with_it(
    tmp_path: Path, item: str, message: str
) -> None:
    with pytest.raises(WebhookError, match=message) as error:
        read(tmp_path, f"- {item}\n")

    assert str(error.value).startswith(f"{tmp_path / 'webhooks.yaml'}:1:")
    assert "SECRET" not in str(error.value)


def test_a_token_that_no_header_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "se\ncret")
    with pytest.raises(WebhookError, match="characters that no header takes") as error:
        read(tmp_path, "- {url: https://a, token_variable: HOOK_TOKEN}")
    assert "cret" not in str(error.value)


def test_all_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(WebhookError) as error:
        read(tmp_path, "- {url: ftp://a}\n- {url: https://a, min_severity: none}\n")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url: https://a\n", "expected a list"),
        ("", "expected a list"),
        ("- [https://a/SECRET\n", r":\d+:\d+: not readable as YAML"),
        ("- url: https://a\n" * (MAX_WEBHOOKS + 1), f"at most {MAX_WEBHOOKS}"),
        ("# " + "x" * (2 << 20), "too many for webhooks"),
    ],
)
def test_a_file_that_is_no_list_of_webhooks_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WebhookError, match=message) as error:
        read(tmp_path, text)
    assert "SECRET" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WebhookError, match=r"none\.yaml cannot be read"):
        read_webhooks(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(WebhookError, match="no UTF-8"):
        read_webhooks(tmp_path / "binary")


@pytest.mark.parametrize(
    ("webhook", "severity", "policy", "wanted"),
    [
        (Webhook("u"), "info", "p", True),
        (Webhook("u", Severity.HIGH), "medium", "p", False),
        (Webhook("u", Severity.HIGH), "high", "p", True),
        (Webhook("u", Severity.HIGH), "critical", "p", True),
        (Webhook("u", policies=frozenset({"q"})), "critical", "p", False),
        (Webhook("u", policies=frozenset({"q", "p"})), "info", "p", True),
    ],
)
def test_a_webhook_gets_what_it_wants(
    webhook: Webhook, severity: str, policy: str, wanted: bool
) -> None:
    one = msgspec.structs.replace(decision(), severity=severity, policy=policy)
    assert webhook.wants(one) is wanted
