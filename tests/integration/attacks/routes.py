"""What each HTTP route of a vLLM server is to the guard. A route that is not here fails the route walk.

Every route that generates does so through `AsyncLLM.generate`, whose requests the engine core blocks
and masks whatever the route is called. What a new route can get wrong is what it then tells: so look
at how it reports a `finish_reason`, and whether it shows anything else of a position.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    GUARDED = "generates, and reports a block"
    REFUSED = "would compute, and is refused under the guard, or does not work there"
    CHANGES = "changes the server for whoever reaches the port; vLLM has it only where an operator asks"
    ADMIN = "changes the guard, with an admin's key"
    HARMLESS = "computes nothing with the model"


_WEIGHTS = "weight transfer is refused: guard_vllm/host.py"
_KEYED = "its own keys: tests/unit/guard_vllm/admin/test_routes.py"

ROUTES: dict[str, tuple[Kind, str]] = {
    # path: what it is, and the attack that shows it or why none is needed
    "/v1/completions": (Kind.GUARDED, "test_sampling_options.py"),
    "/v1/chat/completions": (Kind.GUARDED, "test_sampling_options.py"),
    "/v1/chat/completions/batch": (Kind.GUARDED, "test_sampling_options.py"),
    "/v1/responses": (Kind.GUARDED, "test_endpoints.py"),
    "/v1/messages": (Kind.GUARDED, "test_endpoints.py"),
    "/inference/v1/generate": (Kind.GUARDED, "test_endpoints.py"),
    "/invocations": (Kind.GUARDED, "test_endpoints.py"),
    "/generative_scoring": (Kind.GUARDED, "test_endpoints.py"),
    "/cohere/v2/chat": (Kind.GUARDED, "made of the chat API: frontend/cohere_api.py"),
    "/v1/systemone": (Kind.REFUSED, "test_endpoints.py: 501 for a model that only makes text"),
    "/v1/realtime": (Kind.REFUSED, "streamed input: tests/unit/guard_vllm/test_streamed_input.py"),
    "/v1/audio/transcriptions": (Kind.REFUSED, "encoder-decoder models: guard_vllm/host.py"),
    "/v1/audio/translations": (Kind.REFUSED, "encoder-decoder models: guard_vllm/host.py"),
    "/pooling": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v1/embeddings": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v2/embed": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/classify": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/score": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v1/score": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/rerank": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v1/rerank": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v2/rerank": (Kind.REFUSED, "pooling models: guard_vllm/host.py"),
    "/v1/load_lora_adapter": (Kind.REFUSED, "--enable-lora: guard_vllm/host.py"),
    "/v1/unload_lora_adapter": (Kind.REFUSED, "--enable-lora: guard_vllm/host.py"),
    "/adapters": (Kind.REFUSED, "SageMaker's name for /v1/load_lora_adapter"),
    "/adapters/{adapter_name}": (Kind.REFUSED, "SageMaker's name for /v1/unload_lora_adapter"),
    "/scale_elastic_ep": (Kind.REFUSED, "test_endpoints.py"),
    "/is_scaling_elastic_ep": (Kind.HARMLESS, ""),
    "/collective_rpc": (Kind.CHANGES, "any method of a worker, the guard's too"),
    "/sleep": (Kind.CHANGES, "sleep mode is refused at start: guard_vllm/host.py"),
    "/wake_up": (Kind.CHANGES, "sleep mode is refused at start: guard_vllm/host.py"),
    "/is_sleeping": (Kind.HARMLESS, ""),
    "/release_kv_cache_memory": (Kind.CHANGES, "sleep mode is refused at start: guard_vllm/host.py"),
    "/reset_prefix_cache": (Kind.CHANGES, "cached prefixes are computed, and judged, again"),
    "/reset_mm_cache": (Kind.CHANGES, "makes requests slower"),
    "/reset_encoder_cache": (Kind.CHANGES, "makes requests slower"),
    "/server_info": (Kind.CHANGES, "shows the configuration, the policies' folder with it"),
    "/pause": (Kind.CHANGES, "ends all requests"),
    "/resume": (Kind.CHANGES, ""),
    "/is_paused": (Kind.HARMLESS, ""),
    "/abort_requests": (Kind.CHANGES, "ends requests of others"),
    "/inference/v1/abort_requests": (Kind.CHANGES, "ends requests of others, by their ids"),
    "/init_weight_transfer_engine": (Kind.CHANGES, _WEIGHTS),
    "/shutdown_weight_transfer_engine": (
        Kind.CHANGES,
        _WEIGHTS,
    ),
    "/start_weight_update": (Kind.CHANGES, _WEIGHTS),
    "/start_draft_weight_update": (Kind.CHANGES, _WEIGHTS),
    "/update_weights": (Kind.CHANGES, _WEIGHTS),
    "/finish_weight_update": (Kind.CHANGES, _WEIGHTS),
    "/update_weight_version": (Kind.CHANGES, "a name alone"),
    "/weight_info": (Kind.HARMLESS, ""),
    "/weight_checker": (Kind.HARMLESS, ""),
    "/get_world_size": (Kind.HARMLESS, ""),
    "/start_profile": (Kind.CHANGES, "writes a profile"),
    "/stop_profile": (Kind.CHANGES, "writes a profile"),
    "/fault_tolerance/apply": (Kind.CHANGES, "stops engines and has them go on"),
    "/fault_tolerance/status": (Kind.HARMLESS, ""),
    "/v1/responses/{response_id}": (Kind.HARMLESS, "test_endpoints.py: shows what was shown"),
    "/v1/responses/{response_id}/cancel": (Kind.HARMLESS, ""),
    "/v1/completions/render": (Kind.HARMLESS, "test_endpoints.py"),
    "/v1/chat/completions/render": (Kind.HARMLESS, "test_endpoints.py"),
    "/v1/responses/render": (Kind.HARMLESS, "test_endpoints.py"),
    "/v1/messages/render": (Kind.HARMLESS, "test_endpoints.py"),
    "/v1/completions/derender": (Kind.HARMLESS, "formats what its caller sends"),
    "/v1/chat/completions/derender": (Kind.HARMLESS, "test_endpoints.py"),
    "/v1/messages/count_tokens": (Kind.HARMLESS, "test_endpoints.py"),
    "/tokenize": (Kind.HARMLESS, "test_endpoints.py"),
    "/detokenize": (Kind.HARMLESS, ""),
    "/tokenizer_info": (Kind.HARMLESS, ""),
    "/v1/models": (Kind.HARMLESS, ""),
    "/load": (Kind.HARMLESS, ""),
    "/version": (Kind.HARMLESS, ""),
    "/kv_event_sources": (Kind.HARMLESS, ""),
    "/health": (Kind.HARMLESS, ""),
    "/ping": (Kind.HARMLESS, ""),
    "/metrics": (Kind.HARMLESS, "test_what_is_told.py"),
    "/openapi.json": (Kind.HARMLESS, ""),
    "/docs": (Kind.HARMLESS, ""),
    "/docs/oauth2-redirect": (Kind.HARMLESS, ""),
    "/redoc": (Kind.HARMLESS, ""),
    "/static": (Kind.HARMLESS, ""),
    "/guard/": (Kind.HARMLESS, "a page without data; it asks for a key"),
    "/guard/events": (Kind.HARMLESS, _KEYED),
    "/guard/v1/events/stream": (Kind.HARMLESS, _KEYED),
    "/guard/v1/status": (Kind.HARMLESS, _KEYED),
    "/guard/v1/policies": (Kind.HARMLESS, _KEYED),
    "/guard/v1/events": (Kind.HARMLESS, _KEYED),
    "/guard/v1/experts": (Kind.HARMLESS, _KEYED),
    "/guard/v1/masks": (Kind.ADMIN, _KEYED),
    "/guard/v1/masks/{mask_id}": (Kind.ADMIN, _KEYED),
    "/guard/v1/policies/{policy}/mode": (Kind.ADMIN, _KEYED),
    "/guard/v1/kill-switch": (Kind.ADMIN, _KEYED),
    "/guard/v1/reload": (Kind.ADMIN, _KEYED),
}
