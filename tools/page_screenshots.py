"""Takes the screenshots of the live page in `docs/images`, with made-up routing.

    python -m tools.page_screenshots [FOLDER]

Needs a Chromium, or apt to fetch Debian's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tools.chromium import ChromiumError, Page, chromium_page
from tools.fake_admin import KEY, RULES, FakeServer, fake_server

FOLDER: Final = Path(__file__).resolve().parents[1] / "docs" / "images"
_WIDE: Final = (1200, 900)
_PHONE: Final = (320, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            tempfile.TemporaryDirectory() as state,
            fake_server(Path(state)) as fake,
            chromium_page() as page,
        ):
            take(page, fake, folder)
    except ChromiumError as error:
        sys.exit(f"{error}")


def take(page: Page, fake: FakeServer, folder: Path) -> None:
    page.show_as(width=_WIDE[0], height=_WIDE[1])
    page.open(f"{fake.base_url}/guard/")
    page.screenshot(folder / "page-key.png")
    fake.route(20_000)
    page.type("#key", KEY)
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#cell').textContent.includes('Busiest')")
    pass_time(page, fake, polls=2)
    page.screenshot(folder / "page-at-rest.png")

    fake.mask((12, 85), (12, 90), reason="jailbreak campaign, INC-2041")
    for rule, value in zip(RULES, (0.47, 0.52, 0.36, 0.33), strict=True):
        fake.decide(rule, value=value, times=2)
    pass_time(page, fake, polls=4, attack=True)
    page.screenshot(folder / "page-under-attack.png")
    page.show_as(width=_WIDE[0], height=_WIDE[1], dark=True)
    pass_time(page, fake, polls=1, attack=True)
    page.screenshot(folder / "page-dark.png")
    page.show_as(width=_PHONE[0], height=_PHONE[1], scale=2)
    pass_time(page, fake, polls=1, attack=True)
    page.screenshot(folder / "page-phone.png", whole=False)


def pass_time(page: Page, fake: FakeServer, *, polls: int, attack: bool = False) -> None:
    """Until the page has asked so often, with requests running."""
    for _ in range(polls):
        tokens = page.evaluate("state.tokens")
        fake.route(6_000, attack=attack)
        page.wait_for(f"state.tokens > {tokens}")
    time.sleep(0.2)


if __name__ == "__main__":
    main()
