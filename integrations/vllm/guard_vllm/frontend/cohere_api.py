"""The Cohere chat API, which vLLM serves where the package `cohere` is installed."""

from __future__ import annotations

from importlib.util import find_spec

from guard_vllm.compat import seam
from guard_vllm.frontend.blocked import CONTENT_FILTER


def install_cohere() -> None:
    """A blocked message ends with ERROR: that API has no word for a filter, and vLLM would say
    COMPLETE for a reason that it does not know."""
    if find_spec("cohere") is not None:
        reasons: dict[str | None, str] = seam("vllm.entrypoints.cohere.serving", "_FINISH_REASON_MAP")
        reasons[CONTENT_FILTER] = "ERROR"
