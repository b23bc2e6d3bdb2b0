"""The live page in a real browser, where one can be had; its API is `tools.fake_admin`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.chromium import ChromiumError, Page, chromium_page
from tools.fake_admin import ATTACKED, KEY, RULES, VIEWER_KEY, FakeServer, fake_server
from tools.page_screenshots import pass_time

pytestmark = pytest.mark.slow

LUMINANCE = """
(() => {
  const channels = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (text) => channels(text).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const back = getComputedStyle(node).backgroundColor;
      if (channels(back)[3] !== 0) return back;
    }
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())
    && !["SCRIPT", "STYLE"].includes(node.tagName));
  return Math.min(...texts.map((node) => {
    const [high, low] = [light(getComputedStyle(node).color), light(behind(node))].sort().reverse();
    return (high + 0.05) / (low + 0.05);
  }));
})()
"""
WIDER_THAN_THE_WINDOW = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    try:
        with chromium_page() as page:
            yield page
    except ChromiumError as error:
        pytest.skip(f"no Chromium here: {error}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with fake_server(tmp_path) as fake:
        fake.route(20_000)
        yield fake


@pytest.fixture
def page(browser: Page, server: FakeServer) -> Iterator[Page]:
    browser.complaints.clear()
    browser.show_as(width=1200, height=900)
    browser.open(f"{server.base_url}/guard/")
    yield browser
    browser.evaluate("sessionStorage.clear()")
    browser.call("Page.navigate", url="about:blank")


def enter(page: Page, key: str = VIEWER_KEY) -> None:
    page.type("#key", key)
    page.press("Enter", 13)


def text_of(page: Page, selector: str) -> str:
    text: str = page.evaluate(f"document.querySelector({selector!r}).innerText")
    return text


def test_it_asks_for_the_key_keeps_it_in_this_tab_and_forgets_it(page: Page) -> None:
    enter(page)
    page.wait_for("document.querySelector('#up').textContent === 'live'")
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert page.evaluate("document.querySelector('#key').value") == ""

    page.evaluate("document.querySelector('#leave').click()")
    assert page.evaluate("sessionStorage.length") == 0
    assert text_of(page, "#policies") == ""
    assert page.complaints == []


def test_a_wrong_key_is_told_and_forgotten(page: Page) -> None:
    enter(page, "wrong")
    page.wait_for("document.querySelector('#alert').innerText.includes('not one of')")
    assert page.evaluate("sessionStorage.length") == 0
    assert page.evaluate("document.activeElement.id") == "key"


def test_the_heatmap_moves_with_what_was_routed_between_polls(page: Page, server: FakeServer) -> None:
    enter(page)
    page.wait_for("state.tokens > 0")
    before = page.evaluate("state.heat[12].shares[85]")
    pass_time(page, server, polls=3, attack=True)

    assert before < 0.05 < page.evaluate("state.heat[12].shares[85]")
    busiest = text_of(page, "#cell")
    assert any(f"L{layer}/E{expert} " in busiest for layer, es in ATTACKED.items() for expert in es)
    assert busiest.removeprefix("Busiest now: ") in page.evaluate(
        "document.querySelector('#heat').getAttribute('aria-label')"
    )


def test_policies_show_their_last_evidence_and_masks_their_reason(
    page: Page, server: FakeServer
) -> None:
    server.decide(RULES[0], value=0.47)
    server.mask((12, 85), reason="INC-2041")
    enter(page, KEY)
    page.wait_for("document.querySelector('#events td')")

    assert "mass 0.470, threshold 0.300" in text_of(page, "#policies")
    assert page.evaluate("document.querySelector('.track i').style.width").startswith("78.")
    assert "restricted-chemistry/stop" in text_of(page, "#events")
    assert "INC-2041" in text_of(page, "#masks")
    assert page.evaluate("state.masked.has('L12/E85')") is True


def test_what_people_write_is_text(page: Page, server: FakeServer) -> None:
    server.mask((1, 2), reason="<img src=x onerror=document.title='owned'><b>bold</b>")
    enter(page)
    page.wait_for("document.querySelector('#masks td')")

    assert "<b>bold</b>" in text_of(page, "#masks")
    assert page.evaluate("document.querySelectorAll('#masks b, #masks img').length") == 0


def test_a_cell_is_read_with_the_keyboard(page: Page, server: FakeServer) -> None:
    enter(page)
    page.wait_for("state.tokens > 0")
    page.evaluate("document.querySelector('#heat').focus()")
    for key, code in (("ArrowRight", 39), ("ArrowDown", 40), ("ArrowDown", 40)):
        page.press(key, code)

    assert text_of(page, "#cell").startswith("L2/E0: ")
    page.evaluate("document.querySelector('#heat').blur()")
    assert text_of(page, "#cell").startswith("Busiest")


def test_it_says_so_where_experts_are_not_counted_and_where_the_guard_is_down(
    page: Page, server: FakeServer
) -> None:
    server.says_experts = False
    server.go_down()
    enter(page)
    page.wait_for("document.querySelector('#up').textContent === 'not live'")

    assert text_of(page, "#no-experts") == "No layer has been counted yet."
    assert "NOT LIVE, 2 blind layers" in text_of(page, "#facts")
    assert page.evaluate("document.title").startswith("NOT LIVE")


def test_a_server_that_is_gone_is_told_and_found_again(page: Page, server: FakeServer) -> None:
    enter(page)
    page.wait_for("state.tokens > 0")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.call("Network.emulateNetworkConditions", offline=True, **offline)
    page.wait_for("document.querySelector('#alert').innerText.includes('does not answer')")
    page.call("Network.emulateNetworkConditions", offline=False, **offline)
    page.wait_for("document.querySelector('#alert').hidden")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_and_can_be_read(page: Page, server: FakeServer, width: int, dark: bool) -> None:
    page.show_as(width=width, height=700, dark=dark)
    assert page.evaluate(WIDER_THAN_THE_WINDOW) is False
    for rule in RULES:
        server.decide(rule)
    server.mask((12, 85), (12, 90), reason="a reason of some length, as people write them")
    enter(page)
    page.wait_for("document.querySelector('#masks td') && state.tokens > 0")

    assert page.evaluate(WIDER_THAN_THE_WINDOW) is False
    assert page.evaluate(LUMINANCE) >= 4.5  # WCAG 2.2, AA
    assert page.complaints == []
