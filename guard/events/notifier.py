"""The threads that send notifications: one for each webhook, so that none waits for another."""

from __future__ import annotations

import http.client
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from guard.events.message import Decision
from guard.events.notification import by_rule, notification
from guard.events.webhooks import Webhook
from guard.failures import Failures, Stage

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 1_000
"""Decisions that may wait for a webhook; more are dropped and counted."""

GROUP_SECONDS: Final = 1.0
"""So long decisions are gathered before they are told, those of a rule together."""

TIMEOUT_S: Final = 10.0
"""How long a receiver may be silent."""

FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 60.0
GIVE_UP_S: Final = 300.0
"""A notification that could not be delivered for so long is given up."""

CLOSE_SECONDS: Final = 5.0
_RETRIED: Final = (408, 425, 429)
"""Refusals that may pass; those of 500 and above do, too."""

Note = Callable[[str, int], None]
"""Counts what became of a notification; see `moe_guard_webhooks_total`."""


class Notifier:
    """note: called from the threads of the webhooks, and from the one that offers"""

    def __init__(self, webhooks: Sequence[Webhook], note: Note, failures: Failures) -> None:
        self._receivers = [_Receiver(webhook, note, failures) for webhook in webhooks]

    def start(self) -> None:
        for receiver in self._receivers:
            receiver.start()

    def offer(self, decision: Decision) -> None:
        """Never waits."""
        for receiver in self._receivers:
            receiver.offer(decision)

    def stop(self) -> None:
        """What waits is sent once more, for a few seconds at most."""
        for receiver in self._receivers:
            receiver.end()
        deadline = time.monotonic() + CLOSE_SECONDS
        for receiver in self._receivers:
            receiver.join(max(deadline - time.monotonic(), 0))


class _Receiver:
    def __init__(self, webhook: Webhook, note: Note, failures: Failures) -> None:
        self._webhook = webhook
        self._note = note
        self._failures = failures
        self._waiting: deque[Decision] = deque()
        self._moved = threading.Condition()
        self._ends_at: float | None = None
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="moe-guard-webhook", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, decision: Decision) -> None:
        if not self._webhook.wants(decision):
            return
        with self._moved:
            is_taken = self._ends_at is None and len(self._waiting) < MAX_WAITING
            if is_taken:
                self._waiting.append(decision)
                self._moved.notify()
        if not is_taken:
            self._note("dropped", 1)

    def end(self) -> None:
        with self._moved:
            self._ends_at = time.monotonic() + CLOSE_SECONDS
            self._moved.notify()

    def join(self, timeout_s: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while decisions := self._gathered():
            for group in by_rule(decisions):
                with self._failures.caught(Stage.DELIVER):
                    self._deliver(group)

    def _gathered(self) -> list[Decision]:
        """Those of a second, waiting for the first; none at the end."""
        with self._moved:
            self._moved.wait_for(lambda: self._waiting or self._ends_at is not None)
            self._moved.wait_for(lambda: self._ends_at is not None, GROUP_SECONDS)
            decisions = list(self._waiting)
            self._waiting.clear()
            return decisions

    def _deliver(self, group: list[Decision]) -> None:
        body = msgspec.json.encode(notification(group))
        begun, delay = time.monotonic(), FIRST_DELAY_S
        while self._ends_at is None or time.monotonic() < self._ends_at:
            fault, may_pass = self._sent(body)
            if fault is None:
                self._tell(None)
                self._note("success", 1)
                return
            self._tell(fault)
            if not may_pass or time.monotonic() + delay - begun > GIVE_UP_S:
                break
            with self._moved:
                if self._moved.wait_for(
                    lambda: self._ends_at is not None, delay * random.uniform(0.5, 1.5)
                ):
                    break
            delay = min(delay * 2, MAX_DELAY_S)
        self._note("failure", 1)

    def _sent(self, body: bytes) -> tuple[str | None, bool]:
        """What went wrong, if anything, and whether it may pass."""
        request = urllib.request.Request(
            self._webhook.url,
            data=body,
            headers={"Content-Type": "application/json", "User-Agent": "moe-guard"},
            method="POST",
        )
        if self._webhook.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._webhook.token}")
        try:
            with _opener().open(request, timeout=TIMEOUT_S):
                return None, False
        except urllib.error.HTTPError as error:
            error.close()
            if 300 <= error.code < 400:
                return f"answers {error.code}: redirects are not followed, give the last URL", False
            return f"answers {error.code}", error.code >= 500 or error.code in _RETRIED
        except urllib.error.URLError as error:
            return f"cannot be reached: {type(error.reason).__name__}", True
        except (OSError, http.client.HTTPException) as error:
            return f"broke off: {type(error).__name__}", True

    def _tell(self, fault: str | None) -> None:
        """When it begins to fail, and when it works again. An error's text may hold the URL."""
        if fault is not None and not self._is_failing:
            logger.warning("MoE Guard: the webhook at %s %s", self._webhook.host, fault)
        elif fault is None and self._is_failing:
            logger.info("MoE Guard: the webhook at %s takes notifications again", self._webhook.host)
        self._is_failing = fault is not None


def _opener() -> urllib.request.OpenerDirector:
    """urllib's own follows redirects, and has handlers for file: and ftp:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
