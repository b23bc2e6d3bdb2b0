"""What a caller may ask of the guard: `vllm_xargs: {"moe_guard_enforce": [policy, ...]}`, no more.

Over HTTP and offline alike it arrives in the engine core as a list of str, in the request's
`sampling_params.extra_args`. A program that calls the engine itself may also give labels there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from difflib import get_close_matches
from typing import Any

from guard.errors import GuardError
from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import MARK, Sources, is_blocked
from guard_vllm.frontend.patching import Argument, Function, wrap
from guard_vllm.frontend.request_labels import GivenLabels, is_over_http, with_given_labels
from guard_vllm.labels import check_labels
from guard_vllm.request_facts import ENFORCE, LABELS

MAX_ID_CHARACTERS = 512
"""Of a request's id, which a caller may choose: it stands in every event of the request."""

MAX_QUOTED_CHARACTERS = 100
"""Of what a caller sent, in an error."""


class RequestArgumentError(GuardError):
    """A request asks for what it may not. Over HTTP it is a 400."""


def install_request_args(sources: Sources) -> None:
    """Every request is checked as it is given to the engine, before a stream to it is opened."""
    engine = seam("vllm.v1.engine.async_llm", "AsyncLLM")
    wrap(engine, "generate", lambda f: _whole(_labelled(f, sources), f, sources))
    processor = seam("vllm.v1.engine.input_processor", "InputProcessor")
    wrap(processor, "process_inputs", lambda f: _checked(f, "params", sources))


def check_prompt(prompt: object, sources: Sources) -> None:
    """Refuse a session whose input is streamed: there what was output becomes prompt again, so that no
    rule could tell the two apart. Raises RequestArgumentError."""
    if isinstance(prompt, AsyncGenerator) and sources.policies:
        raise RequestArgumentError(
            "streamed input is not served under MoE Guard's policies, because output would be judged "
            "as prompt; give the whole prompt in one request"
        )


def check_request_id(request_id: object) -> None:
    """Refuse an id that would forge a line of a log, or fill it. Raises RequestArgumentError."""
    if not isinstance(request_id, str):
        return
    if len(request_id) > MAX_ID_CHARACTERS:
        raise RequestArgumentError(
            f"request_id: {len(request_id)} characters are too many; give at most {MAX_ID_CHARACTERS}"
        )
    if not request_id.isprintable():
        raise RequestArgumentError(
            "request_id: it holds characters that cannot be printed, such as the end of a line; "
            "give one without them"
        )


def check_params(params: Any, sources: Sources) -> None:
    """`params`: vLLM's sampling parameters. Raises RequestArgumentError."""
    if extra_args := getattr(params, "extra_args", None):
        trusted = not is_over_http()
        check_request_args(extra_args, sources.policies, redact=sources.redact, trusted=trusted)
    if stop := getattr(params, "stop", None):
        check_stop_strings(stop)


def check_request_args(
    extra_args: Mapping[Any, object] | None,
    policies: Collection[str],
    *,
    redact: bool = False,
    trusted: bool = False,
) -> None:
    """Check the keys that are the guard's; others are left alone.

    redact: tell the caller no policy's name
    trusted: the caller is a program of the operator's, which may give labels

    Raises RequestArgumentError, LabelError.
    """
    for key in extra_args or ():
        if not (isinstance(key, str) and key.startswith(MARK)):
            continue
        assert extra_args is not None, "an empty mapping has no keys"
        value = extra_args[key]
        if key == ENFORCE:
            _check_enforce(value, policies, redact)
        elif key == LABELS and isinstance(value, GivenLabels):
            continue  # checked where they were read
        elif key == LABELS and trusted:
            check_labels(value)
        else:
            raise RequestArgumentError(_unknown_key(key))


def check_stop_strings(stop: str | Collection[str]) -> None:
    """Refuse stop strings that would read like a block. Raises RequestArgumentError."""
    for string in (stop,) if isinstance(stop, str) else stop:
        if is_blocked(string):
            raise RequestArgumentError(
                f"stop: {_shortly(string)} cannot be a stop string here, because as a stop_reason it "
                f"says that MoE Guard blocked the request; choose one that does not begin with {MARK!r}"
            )


def _checked(original: Function, name: str, sources: Sources) -> Function:
    """`original`, which may be an async generator, with the check done as soon as it is called."""
    params = Argument(original, name)

    def checked(*args: Any, **kwargs: Any) -> Any:
        check_params(params.of(args, kwargs), sources)
        return original(*args, **kwargs)

    return checked


def _labelled(original: Function, sources: Sources) -> Function:
    """`original`, checked as `_checked` does, and called with the labels of the HTTP request."""
    argument = Argument(original, "sampling_params")

    def labelled(*args: Any, **kwargs: Any) -> Any:
        params = argument.of(args, kwargs)
        check_params(params, sources)
        args, kwargs = argument.replaced(args, kwargs, with_given_labels(params))
        return original(*args, **kwargs)

    return labelled


def _whole(checked: Function, original: Function, sources: Sources) -> Function:
    prompt = Argument(original, "prompt")
    request_id = Argument(original, "request_id")

    def whole(*args: Any, **kwargs: Any) -> Any:
        check_request_id(request_id.of(args, kwargs))
        check_prompt(prompt.of(args, kwargs), sources)
        return checked(*args, **kwargs)

    return whole


def _check_enforce(value: object, policies: Collection[str], redact: bool) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise RequestArgumentError(
            f"{ENFORCE}: expected a list of policy names, found {_shortly(value)}; "
            f'write for example "{ENFORCE}": ["restricted-chemistry"]'
        )
    for name in value:
        if name not in policies:
            near = [] if redact else get_close_matches(name, policies, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "ask the operator which there are"
            raise RequestArgumentError(f"{ENFORCE}: there is no policy {_shortly(name)}; {hint}")


def _unknown_key(key: str) -> str:
    shown = _shortly(key)
    if "label" in key:
        return (
            f"{shown}: labels come from configured headers or API keys, never from the body; leave it "
            "out"
        )
    return f"{shown}: a request can set only {ENFORCE!r}; leave it out"


def _shortly(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."
