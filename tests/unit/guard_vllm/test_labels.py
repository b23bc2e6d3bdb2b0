"""Sources of labels: what a file of API keys and configured headers may say; no error quotes a key."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guard_vllm.frontend.blocked import Sources
from guard_vllm.frontend.request_labels import LabelMiddleware, is_over_http, with_given_labels
from guard_vllm.labels import (
    MAX_LABELS,
    ApiKeyLabels,
    LabelError,
    LabelSources,
    check_labels,
)
from hypothesis import given
from hypothesis import strategies as st

SECRET = "sk-very-secret"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("tenant=a", "expected a mapping of names to texts, found str"),
        ({"tenant": 1}, "labels.tenant: a value is a text of at most 256 characters"),
        ({"tenant": None}, "labels.tenant: a value is a text"),
        ({"tenant": "x" * 257}, "at most 256 characters"),
        ({1: "a"}, "'1' is no name"),
        ({"": "a"}, "'' is no name"),
        ({"n" * 65: "a"}, "1 to 64 characters"),
        ({str(n): "a" for n in range(MAX_LABELS + 1)}, "33 are too many; give at most 32"),
    ],
    ids=["text", "number", "none", "long", "name", "empty", "long name", "many"],
)
def test_labels_are_a_few_short_texts(labels: object, said: str) -> None:
    with pytest.raises(LabelError, match=said):
        check_labels(labels)
    assert check_labels({"n" * 64: "x" * 256}) == {"n" * 64: "x" * 256}


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}: {{tenant: red-team}}\n",
        json.dumps({SECRET: {"tenant": "red-team"}}),
        f"sha256:{DIGEST}: {{tenant: red-team}}\n",
        f"sha256:{DIGEST.upper()}: {{tenant: red-team}}\n",
    ],
    ids=["yaml", "json", "digest", "digest in capitals"],
)
def test_a_key_gives_its_labels_and_no_other_does(tmp_path: Path, text: str) -> None:
    keys = ApiKeyLabels.read(keys_file(tmp_path, text))
    assert keys.of(SECRET.encode()) == {"tenant": "red-team"}
    assert keys.of(SECRET.upper().encode()) == {}
    assert keys.of(f"sha256:{DIGEST}".encode()) == {}, "the digest is no key"
    assert keys.of(b"") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"- {SECRET}\n", "expected one mapping"),
        (f"{SECRET}: {{tenant: 1}}\n", "keys.yaml:1:26: a label's value is a text"),
        (f"{SECRET}: red-team\n", "keys.yaml:1:17: expected a mapping of labels"),
        (f"{SECRET}: {{a: b}}\n{SECRET}: {{a: c}}\n", "keys.yaml:2:1: not readable as YAML or JSON"),
        (f"{SECRET}: {{a: b}}\nsha256:{DIGEST}: {{a: c}}\n", "an API key is there twice"),
        ("sha256:abc: {a: b}\n", "sha256: is followed by 64 hexadecimal digits"),
        ("1234: {a: b}\n", "an API key is a text; write it in quotes"),
        (f"{SECRET}: {{a: b\n", "not readable as YAML or JSON"),
        ("", "expected one mapping"),
    ],
    ids=["list", "number", "no labels", "twice", "twice, digest", "digest", "bare", "broken", "empty"],
)
def test_a_file_that_is_wrong_is_refused_and_no_key_is_quoted(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(LabelError) as raised:
        ApiKeyLabels.read(keys_file(tmp_path, text))
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"none\.yaml cannot be read: No such file"):
        ApiKeyLabels.read(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff" + SECRET.encode())
    with pytest.raises(LabelError, match="are no UTF-8 text") as raised:
        ApiKeyLabels.read(tmp_path / "binary")
    assert raised.value.__cause__ is None


def test_a_file_that_everybody_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ApiKeyLabels.read(keys_file(tmp_path, f"{SECRET}: {{a: b}}\n"))
    assert not caplog.records
    ApiKeyLabels.read(keys_file(tmp_path, f"{SECRET}: {{a: b}}\n", mode=0o604))
    assert "chmod 600" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"tenant": "x tenant"}, "is no name of a header"),
        ({"tenant": ""}, "is no name of a header"),
        ({"tenant": 1}, "labels.tenant: a value is a text"),
        ({"tenant": "Authorization"}, "holds a secret"),
    ],
    ids=["space", "empty", "number", "secret"],
)
def test_a_source_that_cannot_be_is_refused(headers: dict[str, str], said: str) -> None:
    with pytest.raises(LabelError, match=said):
        LabelSources.of_settings(headers, None)


def test_the_keys_label_wins_over_the_headers(tmp_path: Path) -> None:
    keys = str(keys_file(tmp_path, f"{SECRET}: {{tenant: blue}}\n"))
    sources = LabelSources.of_settings({"tenant": "X-Tenant", "region": "x-region"}, keys)
    headers = [(b"x-tenant", b"red"), (b"x-region", b" eu "), (b"x-other", b"z")]
    bearer = (b"authorization", b"bearer " + SECRET.encode())
    assert sources.labels_of(headers) == {"tenant": "red", "region": "eu"}
    assert sources.labels_of([*headers, bearer]) == {"tenant": "blue", "region": "eu"}
    basic = (b"authorization", b"Basic " + SECRET.encode())
    assert sources.labels_of([basic]) == {}


def test_a_header_that_is_there_twice_is_refused_if_it_matters() -> None:
    sources = LabelSources.of_settings({"tenant": "x-tenant"}, None)
    with pytest.raises(LabelError, match="'x-tenant' is there 2 times"):
        sources.labels_of([(b"x-tenant", b"a"), (b"X-Tenant", b"a")])
    others = [
        (b"x-other", b"a"),
        (b"x-other", b"b"),
        (b"authorization", b"a"),
        (b"authorization", b"b"),
    ]
    assert sources.labels_of(others) == {}


TENANT = LabelSources.of_settings({"tenant": "X-Tenant"}, None)


@pytest.mark.parametrize("name", [b"x-tenant", b"X-TENANT", b"X-Tenant", b"x-TeNaNt"])
def test_a_header_is_the_same_in_any_case(name: bytes) -> None:
    assert TENANT.labels_of([(name, b"red")]) == {"tenant": "red"}


@pytest.mark.parametrize(
    "name",
    [
        *(b"x_tenant", b"X_TENANT", b"xtenant", b"x--tenant", b"x-tenant-", b" x-tenant", b"x-tenant "),
        *(b"x-tenant:", b"http_x_tenant", b"x.tenant", b"x-tenant\x00", b"tenant", b"x-t\xe9nant"),
    ],
)
def test_a_header_that_only_looks_like_it_gives_no_label(name: bytes) -> None:
    """Such as those that a proxy passes on because its rule does not name them."""
    assert TENANT.labels_of([(name, b"red")]) == {}
    assert TENANT.labels_of([(name, b"red"), (b"x-tenant", b"blue")]) == {"tenant": "blue"}


@pytest.mark.parametrize(
    "value",
    [
        b"red\r\nx-tenant: blue",
        b"red\nblue",
        b"red\x00",
        b"red\x7f",
        b"\x1b[31mred",
        b"a\x85b",
        b"a\tb",
    ],
)
def test_a_value_that_would_begin_another_line_is_refused_and_not_quoted(value: bytes) -> None:
    with pytest.raises(LabelError, match="has characters that no label has") as raised:
        TENANT.labels_of([(b"x-tenant", value)])
    assert str(raised.value).isprintable()


def test_values_that_a_proxy_joined_are_one_value_and_none_of_them() -> None:
    assert TENANT.labels_of([(b"x-tenant", b"red, blue")]) == {"tenant": "red, blue"}


def test_what_headers_give_is_bounded() -> None:
    many = {f"l{number}": f"x-{number}" for number in range(MAX_LABELS)}
    sources = LabelSources.of_settings(many, None)
    headers = [(f"x-{number}".encode(), b"v" * 256) for number in range(MAX_LABELS)]

    assert len(sources.labels_of(headers)) == MAX_LABELS
    with pytest.raises(LabelError, match="at most 256 characters") as raised:
        sources.labels_of([*headers[1:], (b"x-0", b"v" * 1_000_000)])
    assert len(str(raised.value)) < 200
    with pytest.raises(LabelError, match="33 are too many"):
        LabelSources.of_settings({**many, "more": "x-more"}, None)


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=300)), max_size=5))
def test_whatever_else_a_caller_sends_its_label_is_the_header_that_was_configured(
    others: list[tuple[bytes, bytes]],
) -> None:
    others = [one for one in others if one[0].lower() != b"x-tenant"]
    assert TENANT.labels_of([*others, (b"x-tenant", b"red")]) == {"tenant": "red"}
    assert TENANT.labels_of(others) == {}


def test_the_labels_of_one_request_are_not_those_of_the_next_or_of_one_beside_it() -> None:
    """Also where a request gives none, or its handler fails."""
    sources = Sources(messages={}, policies=(), has_rules=lambda: False, redact=False)
    sources.labels = TENANT
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        params = with_given_labels(SimpleNamespace(extra_args=None))
        seen[scope["path"]] = (is_over_http(), (params.extra_args or {}).get("moe_guard_labels"))
        if scope["path"] == "/fails":
            raise RuntimeError

    async def call(path: str, *headers: tuple[bytes, bytes]) -> None:
        scope = {"type": "http", "path": path, "headers": list(headers)}
        await LabelMiddleware(app, sources)(scope, None, None)

    async def all_of_them() -> None:
        together = [
            call("/red", (b"x-tenant", b"red")),
            call("/none"),
            call("/blue", (b"x-tenant", b"blue")),
            call("/fails", (b"x-tenant", b"red")),
        ]
        await asyncio.gather(*together, return_exceptions=True)
        await call("/later")

    asyncio.run(all_of_them())
    assert seen == {
        "/red": (True, {"tenant": "red"}),
        "/none": (True, None),
        "/blue": (True, {"tenant": "blue"}),
        "/fails": (True, {"tenant": "red"}),
        "/later": (True, None),
    }
    assert not is_over_http()
