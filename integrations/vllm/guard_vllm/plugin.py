"""The entry point `vllm.general_plugins`: called in every process of vLLM, before anything is built.

Off means off: without a policies setting nothing below happens but four checks at start. With one,
the guard hangs on instances (an engine core, a worker, a model runner, its routers), and vLLM's
classes stay as they are, but for the front end's few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from guard.errors import UnsupportedHostError
from guard.fault_injection import conduct
from guard_vllm.compat import seam
from guard_vllm.logs import log_where_vllm_logs
from guard_vllm.settings import CONFIG_KEY, Settings

_REGISTERED = "_moe_guard_registered"
_unsupported: list[UnsupportedHostError] = []


def register() -> None:
    """Hook the places where vLLM builds a config, an engine core, a worker and a front end.

    On a vLLM that the guard does not know, a server with policies is refused when its config is
    built; one without is left alone.
    """
    engine_args = seam("vllm.engine.arg_utils", "EngineArgs")
    if getattr(engine_args, _REGISTERED, False):
        return
    _around(engine_args, "create_engine_config", _create_engine_config)
    setattr(engine_args, _REGISTERED, True)
    try:
        _around(seam("vllm.v1.worker.worker_base", "WorkerBase"), "__init__", _init_worker)
        # Not __init__: vLLM loads plugins in it, so in a spawned engine core it is already running.
        core = seam("vllm.v1.engine.core", "EngineCore")
        _around(core, "_initialize_kv_caches", _initialize_kv_caches)
        _around(seam("vllm.v1.engine.llm_engine", "LLMEngine"), "__init__", _init_llm_engine)
        _around(seam("vllm.v1.engine.async_llm", "AsyncLLM"), "__init__", _init_async_llm)
    except UnsupportedHostError as error:
        _unsupported.append(error)


def _around(owner: type, name: str, around: Callable[..., Any]) -> None:
    stock = seam(owner, name)

    @functools.wraps(stock)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(stock, self, *args, **kwargs)

    setattr(owner, name, wrapper)


def _settings(vllm_config: Any) -> Settings | None:
    settings = Settings.of(vllm_config.additional_config)
    if settings is not None:
        log_where_vllm_logs()
        conduct(settings.inject_faults)
    return settings


def _create_engine_config(stock: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    config = stock(engine_args, *args, **kwargs)
    settings = _settings(config)
    if settings is not None:
        if _unsupported:
            raise _unsupported[0]
        from guard_vllm.start import resolve

        resolved = resolve(config, settings)
        # In the config so that every process and vLLM's compile key see the same.
        config.additional_config = {**config.additional_config, CONFIG_KEY: resolved.as_section()}
        usage = kwargs.get("usage_context", args[0] if args else None)
        if getattr(usage, "name", None) == "OPENAI_API_SERVER":
            from guard_vllm.hangup import take_hangups

            take_hangups()
    return config


def _init_worker(stock: Any, worker: Any, *args: Any, **kwargs: Any) -> None:
    stock(worker, *args, **kwargs)
    settings = _settings(worker.vllm_config)
    if settings is not None:
        from guard_vllm.worker import WorkerGuard

        WorkerGuard(worker, settings)


def _initialize_kv_caches(stock: Any, core: Any, *args: Any, **kwargs: Any) -> Any:
    kv_cache_config = stock(core, *args, **kwargs)
    settings = _settings(core.vllm_config)
    if settings is not None:
        from guard_vllm.engine_core import EngineCoreGuard

        EngineCoreGuard(core, settings)
    return kv_cache_config


def _init_llm_engine(stock: Any, engine: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    settings, bus = _settings(vllm_config), _front_end_bus(vllm_config)
    stock(engine, vllm_config, *args, **kwargs)
    if settings is not None and bus is not None:
        from guard_vllm.client import num_engines, require_hellos
        from guard_vllm.reload import reload_offline

        require_hellos(bus, num_engines(engine.engine_core))
        reload_offline(engine, settings, bus, vllm_config)


def _init_async_llm(stock: Any, engine: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    settings, bus = _settings(vllm_config), _front_end_bus(vllm_config)
    stock(engine, vllm_config, *args, **kwargs)
    if settings is None or bus is None:
        return
    get_supported_tasks = seam(engine, "get_supported_tasks")
    is_up = False

    async def guarded_get_supported_tasks() -> Any:
        """What an API server asks its engines before it serves. An engine's hello is ahead of its
        answer, on the same socket."""
        from guard_vllm.admin.context import open_admin
        from guard_vllm.client import num_engines, require_hellos
        from guard_vllm.notifying import notify_webhooks
        from guard_vllm.reload import reload_in_server
        from guard_vllm.watching import watch_policies

        nonlocal is_up
        tasks = await get_supported_tasks()
        if is_up:
            return tasks  # vLLM asks again with each request
        require_hellos(bus, num_engines(engine.engine_core), timeout_s=0)
        reload_in_server(engine, settings, bus, vllm_config)
        open_admin(engine, settings, bus)
        watch_policies(engine, settings, bus)
        notify_webhooks(engine, settings, bus)
        if engine.observability_config.otlp_traces_endpoint is not None:
            from guard_vllm.tracing import trace_decisions

            trace_decisions(engine, bus)
        is_up = True
        return tasks

    engine.get_supported_tasks = guarded_get_supported_tasks


def _front_end_bus(vllm_config: Any) -> Any:
    settings = _settings(vllm_config)
    if settings is None:
        return None
    from guard_vllm.start import open_front_end

    return open_front_end(vllm_config, settings)
