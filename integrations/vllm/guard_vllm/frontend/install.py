"""The front end's part of the plugin, in the API server's process and for the offline LLM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from guard_vllm.frontend.blocked import Sources
from guard_vllm.frontend.chat_api import install_chat
from guard_vllm.frontend.cohere_api import install_cohere
from guard_vllm.frontend.completions_api import install_completions
from guard_vllm.frontend.derender_api import install_derender
from guard_vllm.frontend.engine_outputs import install_engine_outputs
from guard_vllm.frontend.messages_api import install_messages
from guard_vllm.frontend.refusals import install_refusals
from guard_vllm.frontend.request_args import install_request_args
from guard_vllm.frontend.request_labels import install_request_labels
from guard_vllm.frontend.responses_api import install_responses
from guard_vllm.labels import NO_LABELS, LabelSources

_sources = Sources(messages={}, policies=(), has_rules=lambda: False, redact=False)


def install_frontend(
    messages: Mapping[str, str],
    policies: Collection[str],
    has_rules: Callable[[], bool],
    *,
    redact: bool = False,
    labels: LabelSources = NO_LABELS,
) -> None:
    """Make every API of vLLM report a block, refuse what cannot be guarded, and check requests.

    The arguments are those of `Sources`. A second call replaces them and patches nothing again.
    Raises UnsupportedHostError where this vLLM is not as expected; nothing is served then.
    """
    _sources.messages = messages
    _sources.policies = policies
    _sources.has_rules = has_rules
    _sources.redact = redact
    _sources.labels = labels
    install_engine_outputs()
    install_request_args(_sources)
    install_request_labels(_sources)
    install_refusals(_sources)
    install_completions()
    install_chat(_sources)
    install_responses(_sources)
    install_messages()
    install_cohere()
    install_derender(_sources)
