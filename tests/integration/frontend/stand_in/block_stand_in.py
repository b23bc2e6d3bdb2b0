"""A vLLM plugin for tests that blocks when a request says so, in the way of the real guard.

A request's `vllm_xargs` may hold
test_block_after: how many output tokens to let pass; the next one is withheld
test_stop_reason: what to report, by default `moe_guard:tiny/stop`; "args" and "labels" report what
    arrived
test_only_choice: with n > 1, block this choice alone
test_only_tenant: block a request that has this label alone
test_block_keeps: 1 to finish the request in the step of its last token, as after draft tokens
"""

from __future__ import annotations

import os
from typing import Any

MESSAGE = "This request was stopped by policy."


def register() -> None:
    from guard_vllm.frontend.install import install_frontend
    from guard_vllm.labels import LabelSources

    install_frontend(
        messages={"moe_guard:tiny/stop": MESSAGE, "moe_guard:tiny/silent": ""},
        policies=("restricted-chemistry", "tiny"),
        has_rules=lambda: True,
        labels=LabelSources.of_settings(
            {"tenant": "X-Tenant", "region": "x-region"}, os.environ.get("TEST_API_KEY_LABELS")
        ),
    )
    _install_blocking()


def _install_blocking() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._update_request_with_output
    if hasattr(original, "stand_in"):
        return

    def update(self: Any, request: Any, new_token_ids: list[int], **kwargs: Any) -> Any:
        asked = request.sampling_params.extra_args or {}
        if not new_token_ids or "test_block_after" not in asked or not _chosen(request, asked):
            return original(self, request, new_token_ids, **kwargs)
        if not request.use_structured_output:
            # A random model ends where it likes; these requests shall end by the block alone.
            request.sampling_params._eos_token_id = None
            request.sampling_params.stop_token_ids = []
        if asked.get("test_block_keeps"):
            tokens, stopped = original(self, request, new_token_ids, **kwargs)
            if request.num_output_tokens < asked["test_block_after"]:
                return tokens, stopped
            _finish(request, asked)
            return tokens, True
        if request.num_output_tokens < asked["test_block_after"]:
            return original(self, request, new_token_ids, **kwargs)
        _finish(request, asked)
        new_token_ids.clear()
        return [], True

    update.stand_in = True  # type: ignore[attr-defined]
    Scheduler._update_request_with_output = update


def _chosen(request: Any, asked: dict[str, Any]) -> bool:
    tenant = asked.get("test_only_tenant")
    if tenant is not None and (asked.get("moe_guard_labels") or {}).get("tenant") != tenant:
        return False
    only = asked.get("test_only_choice")
    return only is None or request.request_id.startswith(f"{only}_")


def _finish(request: Any, asked: dict[str, Any]) -> None:
    from vllm.v1.request import RequestStatus

    reason = asked.get("test_stop_reason", "moe_guard:tiny/stop")
    if reason == "args":
        reason = f"moe_guard:args/{asked.get('moe_guard_enforce')!r}"
    if reason == "labels":
        reason = f"moe_guard:labels/{asked.get('moe_guard_labels')!r}"
    request.status = RequestStatus.FINISHED_STOPPED
    request.stop_reason = reason
    request.resumable = False
