"""Images and audio: to a model their placeholders are tokens of the prompt, each with its own row.

vLLM puts the encoder's output in their embeddings' place and routes the rows as any others, so nothing
of the guard looks at what a token is. Shown on vLLM's own requests, rows' positions and block hashes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guard_vllm.kv_isolation import Isolation
from guard_vllm.runners import hook_runner
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request

from guard.failures import Failures
from tests.unit.guard_vllm.test_kv_isolation import STATIC, status

IMAGE_TOKEN, IMAGE = 9, PlaceholderRange(offset=4, length=24)


def request_with_image(image: str) -> Request:
    """40 tokens, 24 of which stand for an image."""
    prompt = list(range(100, 140))
    prompt[4:28] = [IMAGE_TOKEN] * IMAGE.length
    return Request(
        request_id="a",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        mm_features=[MultiModalFeatureSpec(None, "image", image, IMAGE)],
    )


class Guard:
    """Notes which rows it is told of."""

    def __init__(self) -> None:
        self.failures = Failures()
        self.prompts: list[int] = []
        self.positions: list[torch.Tensor] = []

    is_idle = True

    def finish_requests(self, req_ids: Any) -> None: ...

    def add_request(self, req_id: str, prompt_tokens: int, facts: Any = None) -> None:
        self.prompts.append(prompt_tokens)

    def count_step(self) -> None: ...

    def begin_step_uncaught(
        self, req_ids: Any, query_start_B1: Any, position_T: torch.Tensor, num_rows: int, _: Any
    ) -> bool:
        self.positions.append(position_T[:num_rows])
        return True


class Runner:
    """What the guard reads of V1's runner for a model with M-RoPE."""

    def __init__(self, rows: int) -> None:
        self.input_batch = SimpleNamespace(num_reqs=1, req_ids=["a"], block_table=[])
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, rows]))
        self.positions = torch.arange(64)
        self.mrope_positions = SimpleNamespace(gpu=torch.zeros(3, 65))

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._prepare_inputs(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any) -> str:
        return "prepared"

    def _sample(self, logits: Any, drafts: Any) -> Any: ...

    def sample_tokens(self, grammar: Any) -> Any: ...

    def _dummy_run(self, rows: int) -> Any: ...


def test_placeholders_count_as_prompt_tokens_and_each_row_has_the_position_of_its_token() -> None:
    request, guard = request_with_image("cat"), Guard()
    runner = Runner(rows=request.num_prompt_tokens)
    hook_runner(runner, guard, is_v2=False).armed = True  # type: ignore[arg-type]

    runner.execute_model(
        SimpleNamespace(
            finished_req_ids=set(),
            scheduled_new_reqs=[NewRequestData.from_request(request, block_ids=([1, 2, 3],))],
            num_scheduled_tokens={"a": request.num_prompt_tokens},
            total_num_scheduled_tokens=request.num_prompt_tokens,
        )
    )

    assert guard.prompts == [40]
    (position_T,) = guard.positions
    assert position_T.tolist() == list(range(40))


@pytest.fixture
def keys_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Extra keys of each block of 16, as vLLM goes through them."""
    name = "generate_block_hash_extra_keys"
    monkeypatch.setattr(kv_cache_utils, name, getattr(kv_cache_utils, name))

    def keys_of(request: Request) -> list[Any]:
        found, image = [], 0
        for start in (0, 16):
            keys, image = kv_cache_utils.generate_block_hash_extra_keys(
                request, start, start + 16, image
            )
            found.append(keys)
        return found

    return keys_of


def test_a_block_of_an_image_is_shared_only_under_the_same_image_and_the_same_masks(
    keys_of: Any,
) -> None:
    cat, dog = request_with_image("cat"), request_with_image("dog")
    plain = keys_of(cat)
    assert plain == [(("mm", "cat", 4),), (("mm", "cat", -12),)]
    Isolation(status(STATIC)).install()

    masked, other = keys_of(cat), keys_of(dog)

    for block in range(2):
        assert masked[block][: len(plain[block])] == plain[block], "vLLM's own keys stay"
        (own,) = masked[block][len(plain[block]) :]
        assert own[0] == "moe_guard"
        assert other[block] == (("mm", "dog", plain[block][0][2]), own)
