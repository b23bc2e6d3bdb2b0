"""What the routes of `/guard/v1` work with, in one API server's process."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from guard.events.bus import EventBus
from guard.overrides.desk import Desk, Expiry
from guard.overrides.store import OverrideStore
from guard_vllm.admin.keys import AdminKeys
from guard_vllm.admin.limits import AdminLimits
from guard_vllm.admin.stream import end_streams_with
from guard_vllm.policies import override_store
from guard_vllm.reload import Reloader, reloader
from guard_vllm.settings import Settings
from guard_vllm.steps import wrap

logger = logging.getLogger(__name__)

PLUGIN: Final = "moe_guard"
_EXPIRES: Final = "_moe_guard_expires"


@dataclass(frozen=True, slots=True)
class AdminContext:
    """keys: None: nobody may call the routes; what lies in the state folder still holds"""

    settings: Settings
    bus: EventBus
    store: OverrideStore
    desk: Desk
    reloader: Reloader
    keys: AdminKeys | None
    limits: AdminLimits = field(default_factory=AdminLimits)


_contexts: list[AdminContext] = []


def admin_context() -> AdminContext | None:
    """This process's, once its engines are up; None where there is no state folder."""
    return _contexts[-1] if _contexts else None


def open_admin(engine: Any, settings: Settings, bus: EventBus) -> None:
    """Once the engines are up, and ahead of the policies' watcher.

    Raises AdminKeyError, LabelError.
    """
    store, own = override_store(settings), reloader()
    if store is None or own is None:
        return
    keys = None if settings.admin_keys is None else AdminKeys.read(Path(settings.admin_keys))
    if keys is not None and PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        logger.warning(
            "MoE Guard has admin keys, but vLLM loads no /guard/v1: set VLLM_PLUGINS=%s, with the "
            "other plugins that you use",
            PLUGIN,
        )
    desk = Desk(store, own.apply)
    _contexts[:] = [AdminContext(settings, bus, store, desk, own, keys)]
    end_streams_with(engine, bus)
    if own.watches and not getattr(engine, _EXPIRES, False):
        setattr(engine, _EXPIRES, True)
        expiry = Expiry(desk, bus.failures)

        def shutdown(stock: Any, *args: Any, **kwargs: Any) -> Any:
            expiry.stop()
            return stock(*args, **kwargs)

        wrap(engine, "shutdown", shutdown)
        expiry.start()
