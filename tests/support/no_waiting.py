"""Refuses what would make the host wait for a GPU, as far as a CPU can tell: operations whose result's
size, or the host's next step, depends on numbers, and tensors made of lists, which are not pinned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING: Final = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::equal",
        "aten::is_nonzero",
        "aten::lift_fresh",
        "aten::masked_select",
        "aten::nonzero",
        "aten::nonzero_numpy",
        "aten::repeat_interleave",
        "aten::unique_consecutive",
        "aten::unique_dim",
        "aten::_unique2",
        "aten::histc",
        "aten::bincount",
    }
)
_INDEXING: Final = frozenset(
    {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
)


class NoWaiting(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """count: operations by name, of which each is a launch or more on a GPU, views apart"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Counter[str]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name  # type: ignore[attr-defined]
        self.count[name] += 1
        if name in _WAITING:
            raise AssertionError(f"{name} makes the host wait for the device")
        if name in _INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError(f"{name} by a mask makes the host wait for the device")
        return func(*args, **(kwargs or {}))
