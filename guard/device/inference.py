"""Inference mode, entered where it is not on already: an engine's step is in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As `torch.inference_mode()`, which takes longer to enter than some of what runs in it."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return wrapper
