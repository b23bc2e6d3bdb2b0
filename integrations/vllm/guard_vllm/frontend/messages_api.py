"""The Anthropic messages API: a blocked message's `stop_reason` is `refusal`."""

from __future__ import annotations

from typing import Any, Literal

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER
from guard_vllm.frontend.patching import Argument, Function, wrap

_REFUSAL = "refusal"


def install_messages() -> None:
    protocol = "vllm.entrypoints.anthropic.protocol"
    for name in ("AnthropicDelta", "AnthropicMessagesResponse"):
        _admit_refusal(seam(protocol, name))
    seam(protocol, "AnthropicStreamEvent").model_rebuild(force=True)  # it contains both
    wrap("vllm.entrypoints.anthropic.serving", "_to_anthropic_stop_reason", _refuse_blocked)


def _admit_refusal(model: Any) -> None:
    field = model.model_fields["stop_reason"]
    if _REFUSAL not in str(field.annotation):
        field.annotation = field.annotation | Literal["refusal"]
        model.model_rebuild(force=True)


def _refuse_blocked(original: Function) -> Function:
    finish_reason = Argument(original, "finish_reason")

    def _to_anthropic_stop_reason(*args: Any, **kwargs: Any) -> Any:
        if finish_reason.of(args, kwargs) == CONTENT_FILTER:
            return _REFUSAL, None
        return original(*args, **kwargs)

    return _to_anthropic_stop_reason
