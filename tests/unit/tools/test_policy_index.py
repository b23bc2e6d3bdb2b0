"""The index of the policy library says what the policies say."""

from __future__ import annotations

from tools.policy_index import INDEX, folders, index


def test_the_index_is_up_to_date() -> None:
    assert INDEX.read_text(encoding="utf-8") == index()


def test_every_policy_has_a_suite_and_a_readme_beside_it() -> None:
    found = folders()

    assert len(found) >= 12
    assert [
        f for f in found if not (f / "tests.yaml").is_file() or not (f / "README.md").is_file()
    ] == []
