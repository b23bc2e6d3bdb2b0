"""What happens to the server while it is under load: reloads good and bad, masks, modes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx

BAD: Final = "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: Not A Name}\n"
GOOD_EVERY_S: Final = 15.0
BAD_EVERY_S: Final = 60.0
MASK_EVERY_S: Final = 40.0
MASKED_FOR: Final = "10s"
MODE_EVERY_S: Final = 90.0
MODED: Final = "restricted-topic-by-mass"


def changing(number: int) -> str:
    """Each one is another: a threshold moves, a rule comes and goes."""
    extra = "    - {name: extra, when: {entropy: {over: 16, below: 1.5}}}\n" if number % 2 else ""
    return f"""\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: changing, severity: info}}
spec:
  mode: audit
  experts: {{some: [{{layers: 0-3, experts: [0-3]}}]}}
  rules:
    - {{name: moves, when: {{rate: {{experts: some, over: 16, above: {number % 7 / 100 + 0.05}}}}}}}
{extra}"""


class Disturbances:
    """Run in a thread until `done`. made: what was done, by what it was, refused calls apart."""

    def __init__(self, address: str, key: str, policies: Path) -> None:
        self._address = address
        self._headers = {"Authorization": f"Bearer {key}"}
        self._policies = policies
        self._number = 0
        self.made: Counter[str] = Counter()

    def run(self, done: threading.Event) -> None:
        due: dict[Callable[[], None], tuple[float, float]] = {
            self._reload: (GOOD_EVERY_S, 0.0),
            self._bad_reload: (BAD_EVERY_S, 0.0),
            self._mask: (MASK_EVERY_S, 0.0),
            self._mode: (MODE_EVERY_S, 0.0),
        }
        begun = time.monotonic()
        while not done.wait(0.5):
            passed = time.monotonic() - begun
            for make, (every_s, last) in due.items():
                if passed - last >= every_s:
                    due[make] = (every_s, passed)
                    self._attempt(make)

    def _attempt(self, make: Callable[[], None]) -> None:
        name = make.__name__.strip("_")
        try:
            make()
        except httpx.HTTPStatusError as error:
            self.made[f"{name}: {error.response.status_code}"] += 1
        except httpx.HTTPError as error:
            self.made[f"{name}: {type(error).__name__}"] += 1
        else:
            self.made[name] += 1

    def _reload(self) -> None:
        self._number += 1
        self._replace(changing(self._number))

    def _bad_reload(self) -> None:
        self._replace(BAD)

    def _replace(self, text: str) -> None:
        file = self._policies / "changing.yaml"
        beside = file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(file)

    def _mask(self) -> None:
        body = {"experts": ["L2/E3"], "reason": "soak", "duration": MASKED_FOR}
        self._call("POST", "/masks", body)

    def _mode(self) -> None:
        mode = "audit" if self.made["mode"] % 2 else "enforce"
        self._call("PUT", f"/policies/{MODED}/mode", {"mode": mode, "reason": "soak"})

    def _call(self, method: str, path: str, body: dict[str, Any]) -> None:
        url = f"{self._address}/guard/v1{path}"
        answer = httpx.request(method, url, json=body, headers=self._headers, timeout=60)
        answer.raise_for_status()
