"""Kernels in machine code, compiled before there is a step, kept on disk for the next start."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

try:
    import numba
    from numba.extending import register_jitable
except ImportError:
    numba = register_jitable = None

logger = logging.getLogger(__name__)


def _hide_what_is_no_function(library: type) -> None:
    """llvmlite's handle of its library has whatever attribute it is asked for, `__dict__` too. vLLM
    asks each object of each module for it when a CPU worker starts (`_rebind_kernels`), and fails at
    what it gets."""
    stock = library.__getattr__  # type: ignore[attr-defined]

    def function_only(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return stock(self, name)

    library.__getattr__ = function_only  # type: ignore[attr-defined]


if numba is not None:
    from llvmlite.binding import ffi

    _hide_what_is_no_function(type(ffi.lib))

_Function = TypeVar("_Function", bound=Callable[..., Any])


def inlined(function: _Function) -> _Function:
    """Lets kernels call it. It stays what it is for everybody else."""
    return function if register_jitable is None else register_jitable(function)


def compiled(function: Callable[..., Any], example: tuple[Any, ...]) -> Callable[..., Any]:
    """The function in machine code, for arguments of the types that these have."""
    return _compiled(function, tuple(map(numba.typeof, example)))


@cache
def _compiled(function: Callable[..., Any], signature: tuple[Any, ...]) -> Callable[..., Any]:
    # Each process writes a file of its own and renames it, so that several may compile at once.
    try:
        return _jit(function, signature, keep=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        _say_once(str(error))
        return _jit(function, signature, keep=False)


def _jit(function: Callable[..., Any], signature: tuple[Any, ...], *, keep: bool) -> Callable[..., Any]:
    jitted: Callable[..., Any] = numba.njit(
        signature, cache=keep, fastmath=False, error_model="numpy", nogil=True
    )(function)
    return jitted


@cache
def _say_once(reason: str) -> None:
    logger.info(
        "moe-guard compiles its kernels in memory at each start, since numba cannot keep them on disk "
        "(%s). Let NUMBA_CACHE_DIR name a directory that can be written to",
        reason,
    )
