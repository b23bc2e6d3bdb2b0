"""One page that opens anywhere, from what was found."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from guard.discover.discovery import discover
from guard.discover.errors import DiscoverError
from guard.discover.probe import fit_probe
from guard.discover.report import NOT_SHOWN, html_report
from guard.discover.summary import summary
from guard.discover.table import Choice
from tests.support.planted_trace import Planted
from tests.unit.discover.test_discovery import PLANTED, QUICK, table_of


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(planted: Planted) -> str:
    table = table_of(planted)
    probe = fit_probe(table) if planted.planted else None
    return html_report([summary(discover(table, QUICK), Choice("target", "benign"), probe, {})])


def test_the_page_has_the_verdict_the_pictures_and_what_it_does_not_show() -> None:
    page = page_of(PLANTED)
    read = _Tags(page)
    assert "experts meet all demands" in read.text
    assert read.tags.count("svg") == 4
    for limit in NOT_SHOWN:
        assert limit in read.text
    for layer, expert in PLANTED.planted_experts:
        assert f"L{layer}/E{expert}" in read.text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = page_of(PLANTED)
    assert "script" not in _Tags(page).tags
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert [address for address in fetched if not address.startswith("data:")] == []


def test_the_same_numbers_give_the_same_page() -> None:
    assert page_of(PLANTED) == page_of(PLANTED)


def test_no_signal_has_a_page_too() -> None:
    assert "No signal" in page_of(Planted(planted=0))


def test_another_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiscoverError, match="kind 'Profile'"):
        html_report([{"kind": "Profile"}])
