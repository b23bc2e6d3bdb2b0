"""Whether kernels are used at all."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from guard.errors import GuardError

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "MOE_GUARD_KERNELS"
"""`auto`, or `torch` for those who do not trust the kernels: then torch alone computes."""

Kernels = Literal["auto", "torch"]

_COMPILERS = {"cpu": "numba", "cuda": "triton"}


def has_kernels(device: torch.device, kernels: Kernels | None = None) -> bool:
    """kernels: None: as the environment variable `MOE_GUARD_KERNELS` says, else `auto`"""
    if (kernels or _chosen()) == "torch" or device.type not in _COMPILERS:
        return False
    compiler = _COMPILERS[device.type]
    if find_spec(compiler) is None:
        _say_that_it_is_missing(compiler)
        return False
    return True


def _chosen() -> str:
    chosen = os.environ.get(KERNELS_VARIABLE) or "auto"
    if chosen not in get_args(Kernels):
        raise GuardError(f"{KERNELS_VARIABLE}={chosen} is not known; set it to auto or to torch")
    return chosen


@cache
def _say_that_it_is_missing(compiler: str) -> None:
    logger.info("%s is not installed, so torch judges each step, which takes longer", compiler)
