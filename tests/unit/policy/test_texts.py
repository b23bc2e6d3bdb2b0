"""A policy set as it was read: whole, so that it can be parsed where its files are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from guard.policy import PolicyError, PolicyTexts, load_policies, load_texts, read_policies
from guard.policy.texts import Text, with_profiles

PROFILE = json.dumps({"apiVersion": "moe-guard/v1", "kind": "Profile", "model": {"architecture": "M"}})


def policy(name: str, profile: str = "") -> str:
    return (
        f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n"
        + (f"  profile: {profile}\n" if profile else "")
        + "  experts: {flagged: [{layer: 1, experts: 1}]}\n"
        "  rules:\n    - {name: r, when: {count: {experts: flagged, atLeast: 1}}}\n"
    )


def names_of_profiles(text: str) -> list[str]:
    read: list[str] = []

    def record(path: Path) -> Text:
        read.append(str(path))
        return Text(str(path), PROFILE)

    with_profiles([Text("folder/p.yaml", text)], record)
    return read


def test_a_set_that_was_read_and_sent_is_loaded_without_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "p.yaml").write_text(policy("p", "../../m.json"))
    (folder / "q.yml").write_text(policy("q"))
    (tmp_path / "m.json").write_text(PROFILE)
    loaded = load_policies(folder)

    sent = msgspec.msgpack.encode(read_policies(folder))
    shutil.rmtree(folder)
    (tmp_path / "m.json").unlink()
    arrived = load_texts(msgspec.msgpack.decode(sent, type=PolicyTexts))

    assert arrived == loaded
    assert [p.profile is not None for p in arrived.policies] == [True, False]


def test_what_could_not_be_read_is_told_when_the_texts_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"kind: \xff")
    (tmp_path / "b.yaml").write_text(policy("b", "no.json"))
    (tmp_path / "c.yaml").write_text("kind: Policy\n")

    with pytest.raises(PolicyError) as caught:
        load_texts(read_policies(tmp_path))

    a, b, *c = (str(fault) for fault in caught.value.faults)
    assert a == f"{tmp_path}/a.yaml:1:7: is not UTF-8 from here on; save the file as UTF-8"
    assert b.startswith(f"{tmp_path}/b.yaml:5:12: the profile {tmp_path}/no.json is no file")
    assert c
    assert all(fault.startswith(f"{tmp_path}/c.yaml:") for fault in c)


@pytest.mark.parametrize(
    "text",
    [
        "spec: {profile: m.json}",
        "spec: {experts: {a: [{profile: m.json, set: s}]}}",
        'spec: {"prof\\x69le": m.json}',
        "spec: {profile: m.json}\n---\nspec: {profile: ./m.json}",
        "spec: {profile: m.json\n",
    ],
    ids=["of the policy", "of a set", "escaped", "twice", "text that breaks off"],
)
def test_every_profile_that_is_named_is_read_once(text: str) -> None:
    expected = [] if text.endswith("\n") else ["folder/m.json"]
    assert names_of_profiles(text) == expected


def test_a_label_that_is_called_profile_names_none() -> None:
    assert names_of_profiles("metadata: {labels: {profile: /etc/hosts}}") == []


def test_texts_without_the_profile_that_they_name_are_refused_at_its_place() -> None:
    with pytest.raises(PolicyError, match=r"p.yaml:5:12: .* m.json is not among the files"):
        load_texts(PolicyTexts((Text("p.yaml", policy("p", "m.json")),)))
