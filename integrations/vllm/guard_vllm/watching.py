"""The API server that reloads watches where the policies come from."""

from __future__ import annotations

import logging
from typing import Any, Final

from guard.events.bus import EventBus
from guard.source.watcher import PolicyWatcher
from guard_vllm import hangup
from guard_vllm.admin.context import admin_context
from guard_vllm.policies import source_to_watch
from guard_vllm.reload import reloader
from guard_vllm.settings import Settings
from guard_vllm.steps import wrap

logger = logging.getLogger(__name__)

_WATCHED: Final = "_moe_guard_watched"


def watch_policies(engine: Any, settings: Settings | None, bus: EventBus) -> None:
    """Watch until the engine is shut down. Its engines have said what they run.

    Nothing happens in API servers behind the first, or where reloads are off.
    """
    puts_in_force = reloader()
    source = None if settings is None else source_to_watch(settings)
    if puts_in_force is None or not puts_in_force.watches or source is None:
        return
    if getattr(engine, _WATCHED, False):
        return
    setattr(engine, _WATCHED, True)
    context = admin_context()
    watcher = PolicyWatcher(
        source,
        puts_in_force.apply,
        lambda: bus.revision,
        bus.failures,
        None if context is None else context.desk,
    )

    def shutdown(stock: Any, *args: Any, **kwargs: Any) -> Any:
        if watcher.trigger in hangup.listeners:  # vLLM shuts an engine down more than once
            hangup.listeners.remove(watcher.trigger)
            watcher.stop()
        return stock(*args, **kwargs)

    wrap(engine, "shutdown", shutdown)
    hangup.listeners.append(watcher.trigger)
    watcher.start()
    logger.info("MoE Guard watches the policies at %s", source.name)
