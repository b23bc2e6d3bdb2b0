"""Where the engine core's finish becomes the `finish_reason` that every API reports."""

from __future__ import annotations

from typing import Any

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER, is_blocked
from guard_vllm.frontend.patching import Argument, Function, wrap


def install_engine_outputs() -> None:
    state = seam("vllm.v1.engine.output_processor", "RequestState")
    wrap(state, "_new_completion_output", _report_content_filter)
    wrap(state, "make_request_output", _end_blocked)


def _report_content_filter(original: Function) -> Function:
    def _new_completion_output(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if is_blocked(output.stop_reason):
            output.finish_reason = CONTENT_FILTER
        return output

    return _new_completion_output


def _end_blocked(original: Function) -> Function:
    new_token_ids = Argument(original, "new_token_ids")
    stop_reason = Argument(original, "stop_reason")

    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = (self, *args)
        if is_blocked(stop_reason.of(call, kwargs)):
            if kept := new_token_ids.of(call, kwargs):
                _keep_last_text(self.detokenizer, kept[-1])
            if not self.detokenizer.output_token_ids:
                _withhold_prompt_logprobs(self.logprobs_processor)
        return original(self, *args, **kwargs)

    return make_request_output


def _keep_last_text(detokenizer: Any, last_token_id: int) -> None:
    """Tokens accepted in the step of the block keep their text.

    vLLM takes the last token of a stopped request for a stop token and leaves it out of the text.
    A blocked request's last token is an ordinary one, where speculative decoding accepted some
    before the one that was withheld.
    """
    if hasattr(detokenizer, "decode_next") and not detokenizer.include_stop_str_in_output:
        detokenizer.output_text += detokenizer.decode_next(last_token_id)


def _withhold_prompt_logprobs(processor: Any) -> None:
    """A request blocked in its prompt is not told what the model would have said within it.

    Else a caller reads the answer to a blocked prompt there, a token a request: by putting one more
    token behind it, and asking for the log probabilities at that place.
    """
    if processor.prompt_logprobs is not None:
        processor.prompt_logprobs = [None] * len(processor.prompt_logprobs)
    processor.prompt_token_id_logprobs = None
