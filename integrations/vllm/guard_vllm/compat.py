"""What this plugin knows of vLLM's private names. No other file looks one up by itself."""

from __future__ import annotations

import importlib
from typing import Any

from guard.errors import UnsupportedHostError


def seam(owner: object, name: str) -> Any:
    """The attribute of vLLM that the plugin hooks; `owner` is an object, or a module's dotted name.

    Raises UnsupportedHostError where this vLLM has no such module or attribute.
    """
    if isinstance(owner, str):
        try:
            owner = importlib.import_module(owner)
        except ImportError as error:
            raise _missing(f"the module {owner!r} ({error})") from error
    try:
        return getattr(owner, name)
    except AttributeError as error:
        holder = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
        raise _missing(f"'{holder}.{name}'") from error


def _missing(what: str) -> UnsupportedHostError:
    version = getattr(importlib.import_module("vllm.version"), "__version__", "of unknown version")
    return UnsupportedHostError(
        f"vLLM {version} does not have {what}, which MoE Guard hooks; "
        "install a vLLM that this release of MoE Guard supports"
    )
