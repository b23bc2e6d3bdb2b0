"""The front end: what callers ask and what they are shown."""

from __future__ import annotations

from guard_vllm.seams.seam import Seam

_OPENAI = "vllm.entrypoints.openai"

SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        "content_filter",
    ),
    Seam(
        "vllm.v1.engine.output_processor",
        "RequestState.make_request_output",
        "keeps the last text",
        takes=("new_token_ids", "stop_reason"),
    ),
    Seam(
        "vllm.v1.engine.output_processor",
        "RequestState",
        "keeps the last text, withholds a blocked prompt's log probabilities",
        has=("detokenizer", "logprobs_processor"),
    ),
    Seam(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor",
        "withholds a blocked prompt's log probabilities",
        has=("prompt_logprobs", "prompt_token_id_logprobs"),
    ),
    Seam(
        "vllm.v1.engine.detokenizer",
        "BaseIncrementalDetokenizer",
        "keeps the last text",
        has=("decode_next", "include_stop_str_in_output", "output_text", "output_token_ids"),
    ),
    Seam(
        "vllm.outputs",
        "CompletionOutput",
        "how a choice ended",
        has=("finish_reason", "index", "stop_reason"),
    ),
    Seam("vllm.outputs", "RequestOutput", "how a request ended", has=("outputs",)),
    Seam(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "checks what a caller asks",
        takes=("prompt", "request_id", "sampling_params"),
    ),
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "checks what a caller asks",
        takes=("params",),
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        "refuses beam search",
    ),
    Seam(
        "vllm.entrypoints.generate.beam_search.offline",
        "BeamSearchOfflineMixin.beam_search",
        "refuses beam search",
    ),
    Seam(
        "vllm.entrypoints.launchers.app",
        "init_entrypoints_middleware",
        "reads a request's labels, and tells HTTP from a program's own calls",
        takes=("app",),
    ),
    Seam(
        "vllm.entrypoints.launchers.grpc_server",
        "",
        "tells that gRPC was asked for, by being imported",
        optional=True,
    ),
    Seam(
        "vllm.entrypoints.grpc_server",
        "",
        "tells that gRPC was asked for, by being imported",
        optional=True,
    ),
    Seam(
        f"{_OPENAI}.completion.serving",
        "OpenAIServingCompletion.completion_stream_generator",
        "ends a blocked stream",
        takes=("request", "result_generator", "request_id", "created_time", "model_name"),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        "refusal",
    ),
    Seam(
        f"{_OPENAI}.chat_completion.serving",
        "OpenAIServingChat.chat_completion_stream_generator",
        "refusal, streamed",
        takes=("result_generator",),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.batch_serving",
        "OpenAIServingChatBatch.chat_completion_full_generator_batch",
        "refusal",
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionResponse",
        "refusal",
        has=("choices",),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionResponseChoice",
        "refusal",
        has=("finish_reason", "message", "stop_reason"),
    ),
    Seam(
        f"{_OPENAI}.chat_completion.protocol", "ChatMessage", "refusal", has=("refusal", "tool_calls")
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses._generate_with_builtin_tools",
        "checks what a caller asks",
        takes=("request_id", "sampling_params"),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_full_generator",
        "incomplete",
        takes=("context",),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_stream_generator",
        "incomplete, streamed",
        takes=("context",),
    ),
    Seam(
        f"{_OPENAI}.responses.serving",
        "OpenAIServingResponses.responses_background_stream_generator",
        "incomplete, in the background",
    ),
    Seam(
        f"{_OPENAI}.responses.context",
        "ParsableContext.need_builtin_tool_call",
        "no tool after a block",
        exact=(),
    ),
    Seam(
        f"{_OPENAI}.responses.context",
        "HarmonyContext.need_builtin_tool_call",
        "no tool after a block",
        exact=(),
    ),
    Seam(f"{_OPENAI}.responses.context", "ParsableContext", "how it ended", has=("finish_reason",)),
    Seam(f"{_OPENAI}.responses.context", "HarmonyContext", "how it ended", has=("finish_reason",)),
    Seam(f"{_OPENAI}.responses.context", "SimpleContext", "how it ended", has=("last_output",)),
    Seam(f"{_OPENAI}.responses.protocol", "IncompleteDetails", "incomplete"),
    Seam(
        f"{_OPENAI}.responses.protocol",
        "ResponsesResponse",
        "incomplete",
        has=("incomplete_details", "output", "status"),
    ),
    Seam("vllm.entrypoints.anthropic.protocol", "AnthropicDelta", "refusal", has=("stop_reason",)),
    Seam(
        "vllm.entrypoints.anthropic.protocol",
        "AnthropicMessagesResponse",
        "refusal",
        has=("stop_reason",),
    ),
    Seam("vllm.entrypoints.anthropic.protocol", "AnthropicStreamEvent", "refusal"),
    Seam(
        "vllm.entrypoints.anthropic.serving",
        "_to_anthropic_stop_reason",
        "refusal",
        takes=("finish_reason",),
        returns=2,
    ),
    Seam("vllm.entrypoints.cohere.serving", "_FINISH_REASON_MAP", "ERROR, for want of a word"),
    Seam("vllm.renderers.online_derenderer", "OnlineDerenderer.derender_chat", "refusal, from tokens"),
    Seam(
        "vllm.renderers.online_derenderer",
        "OnlineDerenderer.derender_chat_stream",
        "refusal, from tokens",
        returns=2,
    ),
)
