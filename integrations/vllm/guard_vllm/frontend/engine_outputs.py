"""Where the engine core's finish becomes the `finish_reason` that every API reports."""

from __future__ import annotations

from typing import Any

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER, is_blocked
from guard_vllm.frontend.patching import Argument, Function, wrap


def install_engine_outputs() -> None:
    state = seam("vllm.v1.engine.output_processor", "RequestState")
    wrap(state, "_new_completion_output", _report_content_filter)
    wrap(state, "make_request_output", _keep_last_text)


def _report_content_filter(original: Function) -> Function:
    def _new_completion_output(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if is_blocked(output.stop_reason):
            output.finish_reason = CONTENT_FILTER
        return output

    return _new_completion_output


def _keep_last_text(original: Function) -> Function:
    """Tokens accepted in the step of the block keep their text.

    vLLM takes the last token of a stopped request for a stop token and leaves it out of the text.
    A blocked request's last token is an ordinary one, where speculative decoding accepted some
    before the one that was withheld.
    """
    new_token_ids = Argument(original, "new_token_ids")
    stop_reason = Argument(original, "stop_reason")

    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = (self, *args)
        if is_blocked(stop_reason.of(call, kwargs)) and (kept := new_token_ids.of(call, kwargs)):
            detokenizer = self.detokenizer
            if hasattr(detokenizer, "decode_next") and not detokenizer.include_stop_str_in_output:
                detokenizer.output_text += detokenizer.decode_next(kept[-1])
        return original(self, *args, **kwargs)

    return make_request_output
