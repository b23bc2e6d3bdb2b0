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


def make_group(name: str, rank: int, size: int) -> dist.ProcessGroup:
    """Every rank of it must call this, at the same time."""
    store = dist.PrefixStore(name, _STORE)  # type: ignore[attr-defined]
    group: Any = dist.ProcessGroupGloo(store, rank, size, _TIMEOUT)
    return group  # type: ignore[no-any-return]


def run_ranks(size: int, run: Callable[[int, dist.ProcessGroup], Result]) -> list[Result]:
    """What `run(rank, group)` returned on each rank; an exception of one is raised here."""
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: run(rank, make_group(name, rank, size)), range(size)))
