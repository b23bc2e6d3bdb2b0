"""Server-sent chunks of the completion APIs: the last chunk of a choice that was blocked.

vLLM sends no chunk for an output without text or tokens before the first token, taking it for a
piece of a prompt still being read. A choice blocked at its first position would then end without
a word; here it gets its last chunk, before the usage.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from guard_vllm.frontend.blocked import CONTENT_FILTER, is_blocked

Chunk = dict[str, Any]  # a chunk of the stream, as JSON
Choice = dict[str, Any]  # one of its choices

_DATA = "data: "
_DONE = "[DONE]"


class BlockedChoices:
    """The choices of one stream that were blocked, in the order in which they were."""

    def __init__(self) -> None:
        self.stop_reasons: dict[int, str] = {}  # by the choice's index

    async def watch(
        self, results: AsyncIterator[Any], outputs: Callable[[Any], list[tuple[int, Any]]]
    ) -> AsyncIterator[Any]:
        """The engine's results, unchanged; `outputs` gives a result's outputs by choice index."""
        async for result in results:
            for index, output in outputs(result):
                if is_blocked(output.stop_reason):
                    self.stop_reasons[index] = output.stop_reason
            yield result


async def end_blocked_choices(
    lines: Any,
    blocked: BlockedChoices,
    head: Callable[[str], Chunk],
    end: Callable[[Choice, str], None],
) -> AsyncIterator[str]:
    """The stream's lines; `end(choice, stop_reason)` edits the last chunk of a blocked choice.

    head: a chunk's fields apart from its choices, made from the stream's first line
    """
    first_line = ""
    ended: set[int] = set()

    def missing() -> list[str]:
        made = []
        for index, stop_reason in blocked.stop_reasons.items():
            if index not in ended:
                choice: Choice = {"index": index, "finish_reason": CONTENT_FILTER}
                choice["stop_reason"] = stop_reason
                end(choice, stop_reason)
                made.append(_line({**head(first_line), "choices": [choice]}))
                ended.add(index)
        return made

    async with aclosing(lines):
        async for line in lines:
            first_line = first_line or line
            if not blocked.stop_reasons:
                yield line
                continue
            body = line.removeprefix(_DATA).strip()
            chunk: Chunk = {} if body == _DONE else json.loads(body)
            for choice in chunk.get("choices", ()):
                index = choice["index"]
                if index in blocked.stop_reasons and choice.get("finish_reason") is not None:
                    choice["finish_reason"] = CONTENT_FILTER
                    end(choice, blocked.stop_reasons[index])
                    ended.add(index)
                    line = _line(chunk)
            if body == _DONE or chunk.get("choices") == []:
                for last in missing():
                    yield last
            yield line


def chunk_of(line: str) -> Chunk:
    """The JSON of a line that holds a chunk."""
    chunk: Chunk = json.loads(line.removeprefix(_DATA))
    return chunk


def _line(chunk: Chunk) -> str:
    return f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
