"""The guard's log lines go where vLLM's go. By themselves they would go nowhere below a warning."""

from __future__ import annotations

import logging

_OURS = ("guard", "guard_vllm")


def log_where_vllm_logs() -> None:
    """Use vLLM's handlers, unless the program has a logging of its own: then that gets the lines."""
    vllm = logging.getLogger("vllm")
    if logging.getLogger().handlers:
        return
    for name in _OURS:
        ours = logging.getLogger(name)
        if not ours.handlers and ours.level == logging.NOTSET:
            ours.setLevel(vllm.level)
            for handler in vllm.handlers:
                ours.addHandler(handler)
            ours.propagate = not vllm.handlers  # a library may yet give the root a handler
