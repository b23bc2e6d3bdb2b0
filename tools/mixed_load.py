"""A mixed load on a guarded server, by the real client, and what its clients saw.

python -m tools.mixed_load http://127.0.0.1:8000 --model moe-guard-demo --seconds 60

Harmless and flagged prompts, chat and completions, whole and streamed, several samples, other tenants,
requests that ask to be judged more strictly, and clients that hang up: a few at a time, in a random
order that a seed fixes. Prompts are the demo's, so that something fires on its model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import openai

from guard.cli.demonstration.assets import find_assets

TENANT_HEADER: Final = "X-Tenant"
EXEMPT_TENANT: Final = "red-team"
MAX_TOKENS: Final = 40
CONCURRENCY: Final = 6
HUNG_UP: Final = "hung up"
_CHUNKS_BEFORE_HANGING_UP: Final = 3


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to ask.

    prompts: names of files of the demo's prompts
    samples: n, each a request of the engine's own
    hangs_up: after some chunks of a long answer
    """

    name: str
    weight: int
    prompts: tuple[str, ...]
    chat: bool = False
    streamed: bool = False
    samples: int = 1
    tenant: str = ""
    enforced: tuple[str, ...] = ()
    hangs_up: bool = False


KINDS: Final = (
    Kind("completion", 4, ("benign", "code")),
    Kind("chat", 3, ("benign", "restricted"), chat=True),
    Kind("streamed chat", 3, ("benign", "code", "restricted"), chat=True, streamed=True),
    Kind("streamed completion", 2, ("restricted",), streamed=True),
    Kind("two samples", 2, ("benign", "restricted"), chat=True, samples=2),
    Kind("exempt", 2, ("restricted",), chat=True, tenant=EXEMPT_TENANT),
    Kind("stricter", 1, ("restricted",), enforced=("restricted-topic-by-mass",)),
    Kind("hangs up", 2, ("benign",), streamed=True, hangs_up=True),
)


@dataclass(slots=True)
class Seen:
    """What clients saw.

    engine_requests: samples asked for
    endings: of each sample, its finish_reason, or `hung up`
    stops: stop_reason of the samples that were blocked
    errors: of requests that ended in one, by its class
    """

    engine_requests: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def end(self, reason: str | None, stop: object = None) -> None:
        self.endings[str(reason)] += 1
        if reason == "content_filter":
            self.stops[str(stop)] += 1


class MixedLoad:
    """base_url: with `/v1`"""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        kinds: Sequence[Kind] = KINDS,
        concurrency: int = CONCURRENCY,
        seed: int = 0,
    ) -> None:
        self._base_url = base_url
        self._model = model
        self._kinds = kinds
        self._concurrency = concurrency
        self._random = random.Random(seed)
        names = {name for kind in kinds for name in kind.prompts}
        assets = find_assets()
        self._texts = {name: [one.text for one in assets.prompts(name)] for name in sorted(names)}
        self.seen = Seen()

    def run(self, *, requests: int | None = None, until: Callable[[], bool] | None = None) -> Seen:
        """Ask so many times, or until told to stop; answers that are under way are waited for."""
        asyncio.run(self._run(self._drawn(requests, until or (lambda: False))))
        return self.seen

    def _drawn(self, requests: int | None, done: Callable[[], bool]) -> Iterator[tuple[Kind, str]]:
        weights = [kind.weight for kind in self._kinds]
        count = 0
        while (requests is None or count < requests) and not done():
            count += 1
            [kind] = self._random.choices(self._kinds, weights)
            yield kind, self._random.choice(self._texts[self._random.choice(kind.prompts)])

    async def _run(self, drawn: Iterator[tuple[Kind, str]]) -> None:
        client = openai.AsyncOpenAI(
            base_url=self._base_url, api_key="none", max_retries=0, timeout=300.0
        )
        async with client, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work(client, drawn))

    async def _work(self, client: openai.AsyncOpenAI, drawn: Iterator[tuple[Kind, str]]) -> None:
        for kind, text in drawn:
            self.seen.kinds[kind.name] += 1
            try:
                await self._ask(client, kind, text)
            except openai.OpenAIError as error:
                self.seen.errors[type(error).__name__] += 1

    async def _ask(self, client: openai.AsyncOpenAI, kind: Kind, text: str) -> None:
        max_tokens = 10 * MAX_TOKENS if kind.hangs_up else MAX_TOKENS
        common: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_tokens,
            "n": kind.samples,
            "extra_headers": {TENANT_HEADER: kind.tenant} if kind.tenant else {},
            "extra_body": _body(kind),
        }
        create: Any
        if kind.chat:
            create = client.chat.completions.create
            common["messages"] = [{"role": "user", "content": text}]
        else:
            create, common["prompt"] = client.completions.create, text
        if kind.streamed:
            await self._read(await create(**common, stream=True), kind)
            return
        answer = await create(**common)
        self.seen.engine_requests += kind.samples
        for choice in answer.choices:
            self.seen.end(choice.finish_reason, getattr(choice, "stop_reason", None))

    async def _read(self, stream: Any, kind: Kind) -> None:
        self.seen.engine_requests += kind.samples
        chunks, is_ended = 0, False
        async with stream:
            async for chunk in stream:
                chunks += 1
                for choice in chunk.choices:
                    if choice.finish_reason is not None:
                        is_ended = True
                        self.seen.end(choice.finish_reason, getattr(choice, "stop_reason", None))
                if kind.hangs_up and chunks >= _CHUNKS_BEFORE_HANGING_UP and not is_ended:
                    self.seen.end(HUNG_UP)
                    return
        if not is_ended:
            self.seen.errors["no ending"] += 1


def _body(kind: Kind) -> Mapping[str, Any]:
    body: dict[str, Any] = {}
    if kind.hangs_up:
        body["ignore_eos"] = True
    if kind.enforced:
        body["vllm_xargs"] = {"moe_guard_enforce": list(kind.enforced)}
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("server", help="its address, without /v1")
    parser.add_argument("--model", required=True, help="the name that it serves")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends = time.monotonic() + given.seconds
    load = MixedLoad(f"{given.server}/v1", given.model, concurrency=given.concurrency, seed=given.seed)
    seen = load.run(until=lambda: time.monotonic() >= ends)
    print(
        json.dumps(
            {
                "engine_requests": seen.engine_requests,
                "kinds": dict(seen.kinds),
                "endings": dict(seen.endings),
                "stops": dict(seen.stops),
                "errors": dict(seen.errors),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
