"""Async scheduling on a CPU, which vLLM's CPU platform turns off: for tests only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def async_scheduling() -> Iterator[None]:
    """An engine that is built meanwhile, in this process, schedules ahead of its worker."""
    from vllm.platforms.cpu import CpuPlatform

    own = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        own.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    setattr(CpuPlatform, own.__name__, classmethod(check_and_update_config))
    try:
        yield
    finally:
        setattr(CpuPlatform, own.__name__, own)
