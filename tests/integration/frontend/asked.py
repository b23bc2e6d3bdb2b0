"""Pieces of requests that the tests of every API share."""

from __future__ import annotations

from typing import Any

STOP_REASON = "moe_guard:tiny/stop"
MESSAGE = "This request was stopped by policy."

# Forty letters, so that each token is one character and no output is cut inside one.
LETTERS = {"regex": "[a-z]{40}"}

# A call in the form that the server's tool parser knows, of 99 to 121 tokens, and 50 letters.
# Position 60 is inside its arguments, position 135 behind it.
CALL_AND_LETTERS = {
    "regex": '<tool_call>\\n\\{"name": "f", "arguments": \\{"a": "[a-z]{60}"\\}\\}\\n'
    "</tool_call>[a-z]{50}"
}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
CHAT_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]


def block(after: int, **more: Any) -> dict[str, Any]:
    """Request fields under which the stand-in lets `after` output tokens pass."""
    return {"vllm_xargs": {"test_block_after": after, **more}}


def letters_then_block(after: int, **more: Any) -> dict[str, Any]:
    return {**block(after, **more), "structured_outputs": LETTERS}
