"""Ranks of one process: threads that talk over gloo, for tests of what ranks say to each other."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")

_STORE = dist.HashStore()  # type: ignore[attr-defined]
_TIMEOUT = timedelta(seconds=20)


def run_ranks(size: int, run: Callable[[int, dist.ProcessGroup], Result]) -> list[Result]:
    """What `run(rank, group)` returned on each rank; an exception of one is raised here."""
    name = uuid.uuid4().hex

    def rank(number: int) -> Result:
        store = dist.PrefixStore(name, _STORE)  # type: ignore[attr-defined]
        group: Any = dist.ProcessGroupGloo(store, number, size, _TIMEOUT)
        return run(number, group)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))
