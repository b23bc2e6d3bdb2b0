"""The API server that gets the engines' decisions tells webhooks of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from guard.events.bus import EventBus
from guard.events.notifier import Notifier
from guard.events.webhooks import read_webhooks
from guard_vllm.reload import reloader
from guard_vllm.settings import Settings
from guard_vllm.steps import wrap

logger = logging.getLogger(__name__)

_NOTIFIED: Final = "_moe_guard_notified"


def notify_webhooks(engine: Any, settings: Settings, bus: EventBus) -> None:
    """Until the engine is shut down. Nothing happens in API servers behind the first.

    Raises WebhookError.
    """
    own = reloader()
    if settings.webhooks is None or own is None or not own.watches or getattr(engine, _NOTIFIED, False):
        return
    setattr(engine, _NOTIFIED, True)
    webhooks = read_webhooks(Path(settings.webhooks))
    notifier = Notifier(webhooks, bus.note_webhook, bus.failures)

    def shutdown(stock: Any, *args: Any, **kwargs: Any) -> Any:
        if notifier.offer in bus.on_decision:  # vLLM shuts an engine down more than once
            bus.on_decision.remove(notifier.offer)
            notifier.stop()
        return stock(*args, **kwargs)

    wrap(engine, "shutdown", shutdown)
    notifier.start()
    bus.on_decision.append(notifier.offer)
    logger.info("MoE Guard tells %d webhooks of decisions", len(webhooks))
