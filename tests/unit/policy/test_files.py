"""Files and folders: which are read, and what of them is a fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guard.policy import PolicyError, load_policies
from guard.policy.yaml12 import MAX_FILE_BYTES


def policy(name: str) -> str:
    return (
        f"apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {{name: {name}}}\n"
        "spec: {rules: [{name: r, when: always}]}\n"
    )


def names(path: Path | str) -> list[str]:
    return [loaded.name for loaded in load_policies(path).policies]


def messages(path: Path | str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_policies(path)
    return [str(fault) for fault in caught.value.faults]


def test_file_may_hold_several_documents(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(policy("b") + "---\n" + policy("a") + "---\n")

    assert names(file) == names(str(file)) == ["a", "b"]


def test_folder_is_read_with_the_folders_below_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.yaml").write_text(policy("b"))
    (tmp_path / "sub" / "a.yml").write_text(policy("a"))
    (tmp_path / "notes.txt").write_text("not: [a policy")

    assert names(tmp_path) == ["a", "b"]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.yaml").write_text("[")
    (tmp_path / ".a.yaml").write_text("[")

    assert names(tmp_path) == []


def test_mounted_config_map_is_read_once(tmp_path: Path) -> None:
    hidden = tmp_path / "..2026_01_01"
    (hidden / "sub").mkdir(parents=True)
    (hidden / "a.yaml").write_text(policy("a"))
    (hidden / "sub" / "b.yaml").write_text(policy("b"))
    (tmp_path / "..data").symlink_to(hidden.name)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    (tmp_path / "sub").symlink_to("..data/sub")

    assert names(tmp_path) == ["a", "b"]


def test_folders_that_link_in_a_ring_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("a"))
    (tmp_path / "ring").symlink_to(tmp_path)

    assert names(tmp_path) == ["a"]


def test_empty_folder_is_an_empty_set(tmp_path: Path) -> None:
    loaded = load_policies(tmp_path)

    assert loaded.policies == ()
    assert len(loaded.revision) == 12


def test_revision_is_of_the_content_not_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "x.yaml").write_text(policy("a") + "---\n" + policy("b"))
    (tmp_path / "two" / "b.yaml").write_text(policy("b"))
    (tmp_path / "two" / "c.yaml").write_text("# moved\n" + policy("a"))

    one, two = load_policies(tmp_path / "one"), load_policies(tmp_path / "two")

    assert one.revision == two.revision != load_policies(tmp_path / "two" / "b.yaml").revision


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n---\n", "\ufeff"])
def test_file_without_a_policy_is_a_fault(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)

    assert messages(file) == [f"{file}:1:1: the file holds no policy; write one or remove it"]
    assert messages(tmp_path) == messages(file)


def test_missing_path_is_a_fault(tmp_path: Path) -> None:
    (message,) = messages(tmp_path / "nope.yaml")

    assert message.startswith(f"{tmp_path / 'nope.yaml'}: there is no such file or folder")


def test_link_to_nothing_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("gone.yaml")

    (message,) = messages(tmp_path)

    assert message.startswith(f"{tmp_path / 'a.yaml'}: there is no such file")


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")

    (message,) = messages(tmp_path)

    assert "is no regular file" in message


def test_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(policy("a").ljust(MAX_FILE_BYTES))
    assert names(file) == ["a"]

    file.write_text(policy("a").ljust(MAX_FILE_BYTES + 1))
    (message,) = messages(file)
    assert f"larger than {MAX_FILE_BYTES} bytes" in message


def test_file_must_be_utf8(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")

    assert messages(file) == [f"{file}:2:4: is not UTF-8 from here on; save the file as UTF-8"]


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + policy("a").replace("\n", "\r\n").encode())

    assert names(file) == ["a"]


def test_faults_of_all_files_come_together_in_reading_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(policy("x"))
    (tmp_path / "b.yaml").write_text("a: [")
    (tmp_path / "c.yaml").write_text(policy("x"))
    (tmp_path / "d.yaml").write_text(policy("D"))

    found = messages(tmp_path)

    assert [message.split(": ")[0].removeprefix(f"{tmp_path}/") for message in found] == [
        "b.yaml:1:5",
        "c.yaml:3:18",
        "d.yaml:3:18",
    ]
    assert f"{tmp_path / 'a.yaml'}:3:18" in found[1]
