"""Decisions as they come, as server-sent events: from the bus's thread to clients of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final
from weakref import WeakKeyDictionary

import msgspec

from guard.events.bus import EventBus
from guard.events.message import Decision
from guard.failures import Stage
from guard_vllm.steps import wrap

MAX_SUBSCRIBERS: Final = 64
"""Of one API server."""

MAX_QUEUED_EVENTS: Final = 1_000
"""That may wait for one subscriber; more are dropped, and it is told how many."""

HEARTBEAT_S: Final = 15.0
"""So that proxies keep a silent stream open, and a client that is gone is noticed."""

_CLOSES: Final = "_moe_guard_closes_streams"
_encoder = msgspec.json.Encoder()


class EventStream:
    """Of one bus. Memory is bounded: by MAX_SUBSCRIBERS times MAX_QUEUED_EVENTS references."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        bus.on_decision.append(self._offer)

    def subscribe(self) -> Subscription | None:
        """Called on the event loop. None: there are too many already. Whoever gets one closes it."""
        with self._lock:
            if len(self._subscriptions) >= MAX_SUBSCRIBERS:
                return None
            made = Subscription(self, asyncio.get_running_loop())
            self._subscriptions.add(made)
            self._bus.note_subscribers(len(self._subscriptions))
        return made

    def leave(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.discard(subscription)
            self._bus.note_subscribers(len(self._subscriptions))

    def note_loss(self) -> None:
        self._bus.note_drop(Stage.DELIVER, 1)

    def end(self) -> None:
        """Every stream ends, so that a server that shuts down does not wait for its clients."""
        with self._lock:
            subscriptions = tuple(self._subscriptions)
        for one in subscriptions:
            one.end()

    def _offer(self, decision: Decision) -> None:
        with self._lock:
            subscriptions = tuple(self._subscriptions)
        for one in subscriptions:
            one.offer(decision)


class Subscription:
    """One client's. Filled by any thread, read on its event loop."""

    def __init__(self, stream: EventStream, loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self._lock = threading.Lock()
        self._queue: deque[Decision | int] = deque()  # a number: so many were lost here
        self._is_ended = False
        self._is_woken = False
        self._wake = asyncio.Event()

    def offer(self, decision: Decision) -> None:
        """Never waits: at most one wake-up is on its way to the loop."""
        with self._lock:
            is_kept = len(self._queue) < MAX_QUEUED_EVENTS
            if is_kept:
                self._queue.append(decision)
            elif isinstance(self._queue[-1], int):
                self._queue[-1] += 1
            else:
                self._queue.append(1)
        if not is_kept:
            self._stream.note_loss()
        self._wake_up()

    def end(self) -> None:
        with self._lock:
            self._is_ended = True
        self._wake_up()

    def close(self) -> None:
        self._stream.leave(self)

    async def lines(self) -> AsyncIterator[bytes]:
        yield b": MoE Guard\n\n"  # the client sees that it is heard
        while True:
            with self._lock:
                item = self._queue.popleft() if self._queue else None
                if item is None:
                    if self._is_ended:
                        return
                    self._is_woken = False
                    self._wake.clear()
            if item is not None:
                yield _event(item)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), HEARTBEAT_S)
            except TimeoutError:
                yield b": heartbeat\n\n"

    def _wake_up(self) -> None:
        with self._lock:
            if self._is_woken:
                return
            self._is_woken = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed, and its clients with it
            self.close()


def _event(item: Decision | int) -> bytes:
    if isinstance(item, int):
        return b'event: dropped\ndata: {"count":%d}\n\n' % item
    name = item.decision_id.encode("ascii", "ignore")
    return b"id: %s\nevent: decision\ndata: %s\n\n" % (name, _encoder.encode(item))


_streams: WeakKeyDictionary[EventBus, EventStream] = WeakKeyDictionary()
_making = threading.Lock()


def event_stream(bus: EventBus) -> EventStream:
    """The bus's one; made when the first client comes."""
    with _making:
        if bus not in _streams:
            _streams[bus] = EventStream(bus)
        return _streams[bus]


def end_streams_with(engine: Any, bus: EventBus) -> None:
    """vLLM shuts its engine down, and then waits for open connections."""
    if getattr(engine, _CLOSES, False):
        return
    setattr(engine, _CLOSES, True)

    def shutdown(stock: Any, *args: Any, **kwargs: Any) -> Any:
        event_stream(bus).end()
        return stock(*args, **kwargs)

    wrap(engine, "shutdown", shutdown)
