"""How vLLM's functions are replaced in this process: once each, and only where as expected."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from guard.errors import UnsupportedHostError
from guard_vllm.compat import seam

Function = Callable[..., Any]

_MARK = "_moe_guard_wraps"


def wrap(owner: object, name: str, make: Callable[[Function], Function]) -> None:
    """Replace `owner.name` by `make(original)`. Where that was done before, nothing happens.

    owner: a class, or a module's dotted name
    """
    original = seam(owner, name)
    if hasattr(original, _MARK):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, original)
    setattr(sys.modules[owner] if isinstance(owner, str) else owner, name, replacement)


class Argument:
    """One argument of a function's calls, however a caller passes it; `self` counts as one."""

    def __init__(self, function: Function, name: str) -> None:
        """Raises UnsupportedHostError where `function` has no parameter of that name."""
        self._name = name
        self._signature = inspect.signature(function)
        parameters = list(self._signature.parameters)
        if name not in parameters:
            raise UnsupportedHostError(
                f"vLLM's {function.__qualname__} has no argument {name!r}, which MoE Guard reads; "
                "install a vLLM that this release of MoE Guard supports"
            )
        self._position = parameters.index(name)

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument in a call; None where the caller left it out."""
        if len(args) > self._position:
            return args[self._position]
        return kwargs.get(self._name)

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with another value for it."""
        if len(args) > self._position:
            return (*args[: self._position], value, *args[self._position + 1 :]), kwargs
        return args, {**kwargs, self._name: value}
