"""The JSON Schema for editors: up to date, taking what the loader takes, refusing what it can see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from guard.policy import parse_policies
from guard.policy.nodes import plain
from guard.policy.yaml12 import read_documents
from tools import policy_schema
from tools.fuzz import policies as fuzz_policies
from tools.policy_schema import FOLDER, schemas, stale

ROOT = FOLDER.parent.parent
MALFORMED = ROOT / "tests" / "unit" / "policy" / "malformed"
VALIDATORS = {name: Draft7Validator(schema) for name, schema in schemas().items()}
YAML = sorted(
    path
    for folder in (ROOT / "policies", ROOT / "demo" / "policies")
    for path in folder.rglob("*.yaml")
)

# What one mapping cannot see, or what is no document at all: the loader alone tells it.
BEYOND_A_SCHEMA = (
    *("yaml-", "two-policies", "profile-", "sets-misnamed", "sets-by-path", "rule-name-twice"),
    *("set-unequal", "set-of-no-profile", "set-not-in", "set-range-backwards", "exception-name-twice"),
    *("exception-of-an-unknown", "exception-day-that", "exception-day-the", "persist-more-hits"),
    *("rate-of-an-unknown", "rate-more-tokens", "dormant-where", "suppressed-without"),
    *("divergence-without", "probe-without", "probe-of-another", "budget-without", "budget-that"),
    *("budget-for", "mask-an-unknown", "mask-of-what", "set-range-of-layers-under-layer-of"),
)


def documents(path: Path) -> list[Any]:
    return parsed(path.read_text())


def parsed(text: str) -> list[Any]:
    """As JSON has them: every key is text."""
    roots = read_documents(text, "p.yaml").roots
    return [json.loads(json.dumps(plain(root))) for root in roots]


def errors(document: Any) -> list[str]:
    suite = isinstance(document, dict) and document.get("kind") == "PolicyTest"
    validator = VALIDATORS["policytest.schema.json" if suite else "policy.schema.json"]
    return [error.message for error in validator.iter_errors(document)]


def test_the_files_are_up_to_date() -> None:
    assert stale() == [], "run: python -m tools.policy_schema"


def test_a_file_that_is_not_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_schema, "FOLDER", tmp_path)

    assert len(stale()) == 3
    for path, text in policy_schema.texts().items():
        path.write_text(text)
    assert stale() == []


@pytest.mark.parametrize("name", VALIDATORS)
def test_a_schema_is_one_and_describes_its_keys(name: str) -> None:
    schema = schemas()[name]
    Draft7Validator.check_schema(schema)

    undescribed = [
        f"{where}.{key}"
        for where, part in schema["$defs"].items()
        for key, value in part.get("properties", {}).items()
        if "description" not in value
    ]
    assert [place for place in undescribed if "MeasureSpec" not in place] == []


@pytest.mark.parametrize("path", YAML, ids=[str(path.relative_to(ROOT)) for path in YAML])
def test_what_ships_is_valid_and_names_its_schema(path: Path) -> None:
    found = documents(path)

    assert found
    assert [errors(document) for document in found] == [[]] * len(found)
    first = path.read_text().splitlines()[0]
    head, _, named = first.partition("$schema=")
    assert head == "# yaml-language-server: "
    assert (path.parent / named).resolve() in policy_schema.texts()


@pytest.mark.parametrize("text", [fuzz_policies.POLICY, fuzz_policies.SETS], ids=["policy", "sets"])
def test_all_of_the_language_is_valid(text: str) -> None:
    assert [errors(document) for document in parsed(text)] == [[]]


SHORT = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: p}
spec:
  experts: {f: [{layers: 1, experts: 3}]}
  rules:
    - {name: a, when: always, then: block}
    - {name: b, when: {always: }, then: {observe: true}}
    - {name: c, when: {all: [always, {always: true}]}, then: {block: }, match: {loraAdapters: a}}
"""


def test_short_forms_are_valid_to_both() -> None:
    assert len(parse_policies(SHORT).policies[0].rules) == 3
    assert [errors(document) for document in parsed(SHORT)] == [[]]


def test_the_demo_profile_is_valid() -> None:
    profile = json.loads((ROOT / "policies" / "profiles" / "demo.json").read_text())

    assert list(VALIDATORS["profile.schema.json"].iter_errors(profile)) == []
    profile["nevermask"] = []
    assert len(list(VALIDATORS["profile.schema.json"].iter_errors(profile))) == 1


SEEN = [path for path in sorted(MALFORMED.glob("*.yaml")) if not path.name.startswith(BEYOND_A_SCHEMA)]


def test_a_malformed_document_is_refused_where_a_schema_can_see_it() -> None:
    assert len(SEEN) > 100

    taken = [path.name for path in SEEN if not any(errors(document) for document in documents(path))]

    assert taken == []
