"""Sources of labels: what a file of API keys and configured headers may say; no error quotes a key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from guard_vllm.labels import (
    MAX_LABELS,
    ApiKeyLabels,
    LabelError,
    LabelSources,
    check_labels,
)

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
