"""The one module that knows vLLM's versions: every private name that the plugin hooks or reads.

`SEAMS` says of each name what is relied on; how to add one stands beside it, in `seams/`. `seam`
looks up declared names only, so a name that is not in the table cannot be hooked; a test reads the
plugin's source for names that go round it; and `make seams` reads the published wheels of vLLM and
says in which versions each one holds.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from guard.errors import UnsupportedHostError
from guard_vllm.seams import SEAMS, Seam

__all__ = ["SEAMS", "Seam", "declares", "seam"]


def seam(owner: object, name: str) -> Any:
    """The attribute of vLLM that the plugin hooks; `owner` is an object, or a module's dotted name.

    Raises UnsupportedHostError where this vLLM has no such module or attribute, LookupError where
    `SEAMS` does not declare it, which is a mistake in the plugin.
    """
    if not _is_declared(owner, name):
        raise LookupError(f"{_holder(owner)}.{name} is not in SEAMS; declare there what is relied on")
    if isinstance(owner, str):
        try:
            owner = importlib.import_module(owner)
        except ImportError as error:
            raise _missing(f"the module {owner!r} ({error})") from error
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _missing(f"'{_holder(owner)}.{name}'") from error


def declares(module: str, name: str) -> bool:
    """Whether the table has this name of this module: itself, or something below it."""
    return any(
        declared.module == module and f"{declared.name}.".startswith(f"{name}." if name else "")
        for declared in SEAMS
    )


def _is_declared(owner: object, name: str) -> bool:
    """What stands in for vLLM, in a test, may have any names."""
    if isinstance(owner, str | ModuleType):
        module = owner if isinstance(owner, str) else owner.__name__
        return not _is_of_vllm(module) or declares(module, name)
    classes = (owner if isinstance(owner, type) else type(owner)).__mro__
    paths = {(kind.__module__, kind.__qualname__) for kind in classes if _is_of_vllm(kind.__module__)}
    return not paths or any(
        ((declared.module, declared.name) in paths and name in declared.has)
        or (declared.attribute == name and (declared.module, declared.name.rpartition(".")[0]) in paths)
        for declared in SEAMS
    )


def _is_of_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def _holder(owner: object) -> str:
    if isinstance(owner, str):
        return owner
    return str(getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner))))


def _missing(what: str) -> UnsupportedHostError:
    version = getattr(importlib.import_module("vllm.version"), "__version__", "of unknown version")
    return UnsupportedHostError(
        f"vLLM {version} does not have {what}, which MoE Guard hooks; "
        "install a vLLM that this release of MoE Guard supports"
    )
