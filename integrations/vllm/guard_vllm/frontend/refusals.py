"""What cannot be served under the guard, and is refused: beam search, gRPC, the Rust front end, ids
that two requests share. And a warning where the port gives more than an API.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from guard.errors import GuardError, UnsupportedHostError
from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import Sources
from guard_vllm.frontend.patching import Function, wrap

_GRPC_MODULES = frozenset({"vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server"})
_RUST = "VLLM_USE_RUST_FRONTEND"
_PLAIN_IDS = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
_DEV_MODE = "VLLM_SERVER_DEV_MODE"

logger = logging.getLogger(__name__)


class BeamSearchError(GuardError):
    """Beam search was asked for under policies. Over HTTP it is a 400."""


def install_refusals(sources: Sources) -> None:
    online = seam("vllm.entrypoints.generate.beam_search.online", "BeamSearchOnlineMixin")
    offline = seam("vllm.entrypoints.generate.beam_search.offline", "BeamSearchOfflineMixin")
    wrap(online, "beam_search", lambda f: _no_beam_search(f, sources))
    wrap(offline, "beam_search", lambda f: _no_beam_search(f, sources))
    wrap(seam("vllm.v1.engine.async_llm", "AsyncLLM"), "__init__", _no_grpc)


def refuse_unguarded_frontends(
    argv: Sequence[str], env: Mapping[str, str], modules: Collection[str] | None = None
) -> None:
    """Refuse the front ends that have no Python in which a block could be reported, and what takes the
    ground from under the others.

    To be called in the process that the operator starts. vLLM loads plugins before it reads its
    arguments, so a config file that asks for gRPC is noticed later, as the server makes its engine:
    by then it has imported the gRPC server. `modules` are the modules imported, by default those of
    this process. Raises UnsupportedHostError.
    """
    if _is_on(env, _RUST):
        raise UnsupportedHostError(
            f"{_RUST}={env[_RUST]}: vLLM's Rust front end cannot be guarded, because it does not "
            f"tell a blocked request from a finished one; unset {_RUST}, or turn MoE Guard off"
        )
    imported = _imported() if modules is None else modules
    if ("serve" in argv and "--grpc" in argv) or not _GRPC_MODULES.isdisjoint(imported):
        raise UnsupportedHostError(
            "--grpc: vLLM's gRPC server cannot be guarded, because it does not tell a blocked "
            "request from a finished one; serve over HTTP, or turn MoE Guard off"
        )
    if _is_on(env, _PLAIN_IDS):
        raise UnsupportedHostError(
            f"{_PLAIN_IDS}={env[_PLAIN_IDS]}: two requests could have one id, by which MoE Guard tells "
            f"apart their state and their masked KV, and draws samples; unset {_PLAIN_IDS}"
        )


def warn_of_open_endpoints(env: Mapping[str, str]) -> None:
    """Say what an operator may not know who asks for vLLM's endpoints for developers."""
    if _is_on(env, _DEV_MODE):
        logger.warning(
            "MoE Guard: with %s whoever reaches this port can call any method of a worker, and so turn "
            "the guard off; unset it where callers are not trusted",
            _DEV_MODE,
        )


def _is_on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip() not in ("", "0")


def _imported() -> set[str]:
    """Names of the imported modules; the one run by `python -m` is known as `__main__` only."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return {*sys.modules, *([main.name] if main is not None else [])}


def _no_grpc(original: Function) -> Function:
    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N807
        refuse_unguarded_frontends(sys.argv, os.environ)
        original(*args, **kwargs)

    return __init__


def _no_beam_search(original: Function, sources: Sources) -> Function:
    def beam_search(*args: Any, **kwargs: Any) -> Any:
        if sources.has_rules():
            raise BeamSearchError(
                "beam search is not served under MoE Guard's policies: each of its steps is a new "
                "request whose prompt is what the beam has so far, so output would be judged as "
                "prompt; sample without beam search"
            )
        return original(*args, **kwargs)

    return beam_search
