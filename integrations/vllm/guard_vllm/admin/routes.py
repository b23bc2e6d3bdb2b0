"""The routes of `/guard/v1`. Those that change something wait until every rank has it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query, Request

from guard.errors import GuardError
from guard.events.load import LayerCounts, decode_counts, of_all_engines
from guard.failures import Stage
from guard.overrides.model import (
    NotThereError,
    OperatorMask,
    OverrideError,
    Overrides,
    parse_duration,
    parse_experts,
)
from guard.policy import PolicyError
from guard_vllm.admin import bodies
from guard_vllm.admin.context import AdminContext, admin_context
from guard_vllm.admin.gate import PERSON
from guard_vllm.admin.keys import Person
from guard_vllm.core_load import CORE_LOAD_METHOD
from guard_vllm.policies import texts_now

logger = logging.getLogger(__name__)

PREFIX = "/guard/v1"
_T = TypeVar("_T")

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": bodies.Problem, "description": text}
    for code, text in {
        400: "What is asked for makes no sense.",
        401: "No key, or one that is not known.",
        403: "The key may look and not change.",
        404: "There is no such thing, or no admin API.",
        409: "It cannot be honoured: which layer, live experts and k; or the engines refuse it.",
        413: "The body is too large.",
        429: "Too many wrong keys, or changes, from this address or in total: see Retry-After.",
    }.items()
}


class _Known:
    """The context and who calls; refused where either is missing."""

    def __init__(self, context: AdminContext, person: Person) -> None:
        self.context = context
        self.person = person


def _viewer(request: Request) -> _Known:
    context = admin_context()
    if context is None or context.keys is None:
        raise HTTPException(404, "Not Found")
    person = request.scope.get(PERSON) or context.keys.person(request.scope["headers"])
    if person is None:
        raise HTTPException(401, "give a key of admin_keys: Authorization: Bearer KEY")
    return _Known(context, person)


def _admin(known: Annotated[_Known, Depends(_viewer)]) -> _Known:
    if not known.person.may_change:
        raise HTTPException(403, "this key's role is viewer: it may look, and change nothing")
    return known


Viewer = Annotated[_Known, Depends(_viewer)]
Admin = Annotated[_Known, Depends(_admin)]


def build_router() -> APIRouter:
    """Its functions are no coroutines, so that FastAPI runs them beside the event loop: they wait."""
    router = APIRouter(prefix=PREFIX, tags=["MoE Guard"], responses=_PROBLEMS)
    router.get("/status", response_model=bodies.Status)(status)
    router.get("/policies", response_model=bodies.Policies)(policies)
    router.get("/events", response_model=bodies.Events)(events)
    router.get("/experts", response_model=bodies.Experts)(experts)
    router.post("/reload", response_model=bodies.Changed)(reload)
    router.put("/policies/{policy}/mode", response_model=bodies.Changed)(set_mode)
    router.put("/kill-switch", response_model=bodies.Changed)(kill_switch)
    router.get("/masks", response_model=list[bodies.Mask])(masks)
    router.post("/masks", response_model=bodies.Changed, status_code=201)(add_mask)
    router.delete("/masks/{mask_id}", response_model=bodies.Changed)(lift_mask)
    return router


def status(known: Viewer) -> dict[str, Any]:
    bus = known.context.bus
    hellos, health = dict(bus.hellos), dict(bus.health)
    engines = []
    for engine, hello in sorted(hellos.items()):
        now = health.get(engine)
        engines.append(
            {
                "engine": engine,
                "revision": hello.revision,
                "live": hello.live if now is None else now.up,
                "blind_layers": hello.blind_layers if now is None else now.blind_layers,
            }
        )
    overrides = _asked(known.context.store.read)
    first = hellos[min(hellos)] if hellos else None
    return {
        "up": bool(engines) and all(one["live"] for one in engines),
        "revision": "" if first is None else first.revision,
        "policies": [] if first is None else list(first.policies),
        "engines": engines,
        "kill_switch": overrides.kill_switch,
        "modes": overrides.modes,
        "masks": [_mask(mask) for mask in overrides.masks],
    }


def policies(known: Viewer) -> dict[str, Any]:
    """In force, in deciding order, as the first engine has them."""
    hellos = dict(known.context.bus.hellos)
    if not hellos:
        return {"revision": "", "policies": []}
    hello = hellos[min(hellos)]
    found: dict[str, dict[str, Any]] = {}
    for rule in hello.rules:
        policy = found.setdefault(
            rule.policy,
            {"policy": rule.policy, "mode": rule.mode, "severity": rule.severity, "rules": []},
        )
        policy["rules"].append(
            {
                "rule": rule.rule,
                "action": rule.action,
                "phase": rule.phase,
                "conditions": list(rule.conditions),
                "thresholds": list(rule.thresholds),
            }
        )
    return {"revision": hello.revision, "policies": list(found.values())}


def events(
    known: Viewer, limit: Annotated[int, Query(ge=1, le=1000)] = 100, policy: str = ""
) -> dict[str, Any]:
    """The latest decisions that reached this process, the newest first."""
    kept = list(known.context.bus.decisions)[::-1]
    chosen = [one for one in kept if not policy or one.policy == policy]
    return {"events": [msgspec.to_builtins(one) for one in chosen[:limit]]}


def experts(known: Viewer) -> dict[str, Any]:
    """How often each expert was chosen in sampled steps, since the first engine started."""
    try:
        answers = known.context.reloader.ask(CORE_LOAD_METHOD)
    except GuardError as error:
        raise HTTPException(409, str(error)) from error
    counted = of_all_engines([decode_counts(answer) for answer in answers])
    return {
        "tokens": counted.tokens,
        "sampled_every": counted.sampled_every,
        "layers": [_layer(layer) for layer in counted.layers],
    }


def _layer(counted: LayerCounts) -> dict[str, Any]:
    load = {} if counted.load is None else msgspec.structs.asdict(counted.load)
    return load | {"layer": counted.layer, "counts": counted.counts}


def reload(known: Admin, body: bodies.ReasonBody) -> dict[str, Any]:
    """Read the policies where they come from, now."""
    return _change(known, "reload", body.reason, lambda: _reload(known.context))


def set_mode(known: Admin, policy: str, body: bodies.ModeBody) -> dict[str, Any]:
    """Over what the policy file says, until it is taken back."""
    return _change(
        known,
        "mode",
        body.reason,
        lambda: _edit(known.context, lambda overrides: overrides.with_mode(policy, body.mode)),
        policy=policy,
        mode=body.mode,
    )


def kill_switch(known: Admin, body: bodies.KillSwitchBody) -> dict[str, Any]:
    """Every policy that enforces, and every operator's mask, only observes."""

    def edit(overrides: Overrides) -> Overrides:
        return msgspec.structs.replace(overrides, kill_switch=body.on)

    return _change(known, "kill-switch", body.reason, lambda: _edit(known.context, edit), on=body.on)


def masks(known: Viewer) -> list[dict[str, Any]]:
    return [_mask(mask) for mask in _asked(known.context.store.read).masks]


def add_mask(known: Admin, body: bodies.MaskBody) -> dict[str, Any]:
    """Take experts out of use, proved like a policy's mask."""
    made: list[OperatorMask] = []

    def edit(overrides: Overrides) -> Overrides:
        changed, mask = overrides.with_mask(
            parse_experts(body.experts),
            by=known.person.name,
            reason=body.reason,
            lasts=None if body.duration is None else parse_duration(body.duration),
            method=body.method,
            labels=body.labels,
            request=body.request,
        )
        made[:] = [mask]
        return changed

    changed = _change(
        known,
        "mask",
        body.reason,
        lambda: _edit(known.context, edit),
        experts=body.experts,
        duration=body.duration,
    )
    return changed | {"mask": _mask(made[0])}


def lift_mask(
    known: Admin, mask_id: str, reason: Annotated[str, Query(max_length=500)] = ""
) -> dict[str, Any]:
    return _change(
        known,
        "unmask",
        reason,
        lambda: _edit(known.context, lambda overrides: overrides.without_mask(mask_id)),
        mask=mask_id,
    )


def _edit(context: AdminContext, edit: Callable[[Overrides], Overrides]) -> str:
    """The revision then in force. Raises OverrideError, HTTPException with 409."""
    _, result = context.desk.change(edit)
    if result.fault is not None:
        raise HTTPException(409, result.fault)
    return result.revision


def _reload(context: AdminContext) -> str:
    try:
        texts, keep = texts_now(context.settings)
    except PolicyError as error:  # counted as what a watcher could not read
        raise HTTPException(409, _refused(context, error)) from error
    result = context.desk.take(texts)
    if result.fault is not None:
        raise HTTPException(409, result.fault)
    keep()
    return result.revision


def _refused(context: AdminContext, error: PolicyError) -> str:
    def load() -> NoReturn:
        raise error

    return context.reloader.apply(load).fault or str(error)


def _change(
    known: _Known, what: str, reason: str, make: Callable[[], str], **facts: Any
) -> dict[str, Any]:
    """Make a change, and write down who asked for it and what became of it."""
    store, name = known.context.store, known.person.name
    outcome = "done"
    try:
        revision = make()
    except HTTPException as error:
        outcome = f"refused: {error.detail}"
        raise
    except GuardError as error:
        outcome = f"refused: {error}"
        code = 404 if isinstance(error, NotThereError) else 400
        raise HTTPException(code, str(error)) from error
    finally:
        logger.warning("MoE Guard: %s by %s: %s (%r)", what, name, outcome, reason)
        try:
            store.audit(name, what, reason, outcome, **facts)
        except OverrideError as error:  # the server's own log has the line above
            known.context.bus.failures.note(Stage.RELOAD, error)
    return {"revision": revision}


def _asked(ask: Callable[[], _T]) -> _T:
    try:
        return ask()
    except OverrideError as error:
        raise HTTPException(500, str(error)) from error


def _mask(mask: OperatorMask) -> dict[str, Any]:
    return {
        "id": mask.id,
        "experts": [f"L{layer}/E{expert}" for layer, expert in mask.experts],
        "by": mask.by,
        "reason": mask.reason,
        "created": _time(mask.created),
        "until": None if mask.until is None else _time(mask.until),
        "method": mask.method,
        "labels": dict(mask.labels),
        "request": mask.request,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
