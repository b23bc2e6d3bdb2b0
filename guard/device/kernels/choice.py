"""Whether kernels are used at all."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from guard.device.kernels.native.build import library
from guard.errors import GuardError

logger = logging.getLogger(__name__)

KERNELS_VARIABLE = "MOE_GUARD_KERNELS"
"""`auto`, or `torch` for those who do not trust the kernels: then torch alone computes."""

Kernels = Literal["auto", "torch"]


def has_kernels(device: torch.device, kernels: Kernels | None = None) -> bool:
    """In C++ on a CPU, in Triton on a GPU.

    kernels: None: as the environment variable `MOE_GUARD_KERNELS` says, else `auto`
    """
    if (kernels or chosen_kernels()) == "torch":
        return False
    if device.type == "cpu":
        return library() is not None
    return device.type == "cuda" and _has_triton()


def kernels_on(device: torch.device) -> str:
    """What computes there: `C++`, `triton` or `torch`."""
    if not has_kernels(device):
        return "torch"
    return "C++" if device.type == "cpu" else "triton"


def chosen_kernels() -> str:
    """Raises GuardError for a name that is none."""
    chosen = os.environ.get(KERNELS_VARIABLE) or "auto"
    if chosen not in get_args(Kernels):
        raise GuardError(f"{KERNELS_VARIABLE}={chosen} is not known; set it to auto or to torch")
    return chosen


@cache
def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    logger.info("triton is not installed, so torch judges each step, which takes longer")
    return False
