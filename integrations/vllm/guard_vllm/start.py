"""What happens in the process that starts a server, and in its API servers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from guard.device.kernels.choice import kernels_on
from guard.events.bus import EventBus
from guard.events.message import Hello
from guard.events.webhooks import read_webhooks
from guard.policy.fault import PolicyError
from guard.program.compile import check_observe_only, compile_policies, num_mask_words
from guard.program.configuration import EXACT_ARCHITECTURES, topology_from_config
from guard.program.fingerprint import check_fingerprints
from guard_vllm.client import open_bus
from guard_vllm.frontend.install import install_frontend
from guard_vllm.frontend.refusals import refuse_unguarded_frontends, warn_of_open_endpoints
from guard_vllm.host import check_host
from guard_vllm.labels import LabelSources
from guard_vllm.policies import find_policies
from guard_vllm.recording import check_recording
from guard_vllm.settings import Settings


def resolve(config: Any, settings: Settings) -> Settings:
    """Check all that can be checked before a model is loaded.

    Raises PolicyError for policies that are wrong or do not fit the model, FingerprintError for weights
    that cannot be read, UnsupportedHostError for a server that cannot be guarded, LabelError for
    sources of labels that cannot be read, WebhookError for webhooks that cannot be told.
    """
    refuse_unguarded_frontends(sys.argv, os.environ)
    warn_of_open_endpoints(os.environ)
    check_host(config)
    check_recording(config, settings)
    label_sources(settings)
    if settings.webhooks is not None:
        read_webhooks(Path(settings.webhooks))
    policies, keep = find_policies(settings)
    if settings.observe_only and (faults := check_observe_only(policies)):
        raise PolicyError(faults)
    topology = topology_from_config(config.model_config.hf_config.to_dict())
    if topology.architecture in EXACT_ARCHITECTURES:
        compile_policies(policies, topology)
    check_fingerprints(policies, config.model_config.model)
    keep()
    kernels = kernels_on(torch.device(config.device_config.device_type))
    return settings.resolved(mask_words=num_mask_words(policies), kernels=kernels)


def label_sources(settings: Settings) -> LabelSources:
    return LabelSources.of_settings(settings.label_headers, settings.api_key_labels)


def open_front_end(config: Any, settings: Settings) -> EventBus:
    """Prepare this process to receive the guard's messages and to show what it did to clients.

    Returns the bus on which the engines say that their guard is live.
    """
    served = config.model_config.served_model_name
    bus = open_bus(settings, served[0] if isinstance(served, list) else served)
    policies: set[str] = set()
    messages: dict[str, str] = {}
    ruled: list[bool] = [True]  # until an engine says otherwise

    def take(hello: Hello) -> None:
        policies.clear()
        policies.update(hello.policies)
        messages.clear()
        if not settings.redact_reasons:
            messages.update((rule.reason, rule.message) for rule in hello.rules)
        ruled[0] = bool(hello.rules)

    bus.on_hello.append(take)
    install_frontend(
        messages,
        policies,
        has_rules=lambda: ruled[0],
        redact=settings.redact_reasons,
        labels=label_sources(settings),
    )

    return bus
