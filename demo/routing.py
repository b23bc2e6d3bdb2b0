"""Runs the demo model through transformers, unguarded, and records each token's routing.

Shapes: T positions (prompt, then every output token but the last, which is never fed back), L
layers, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.program.topology import MoELayer, Topology
from guard.program.verdict import Routing

MODEL_DIR: Final = Path(__file__).parent / "model"
MAX_NEW_TOKENS: Final = 64
BATCH: Final = 32


class Run(NamedTuple):
    """One answered prompt."""

    routing: Routing
    output: str


def gates(routing: Routing, num_experts: int) -> NDArray[np.float64]:
    """The gate weight of each chosen expert, 0 of the others: [T, L, E]."""
    gates_TLE = np.zeros((*routing.topk_ids.shape[:2], num_experts))
    np.put_along_axis(
        gates_TLE,
        routing.topk_ids.astype(np.int64),
        routing.topk_weights.astype(np.float64),
        axis=2,
    )
    return gates_TLE


class Recorder:
    """Greedy answers of a saved model, in float32 from its bfloat16 weights."""

    def __init__(self, folder: Path = MODEL_DIR, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        config = self.model.config
        self.topology = Topology(
            config.architectures[0],
            tuple(
                MoELayer(number, config.num_experts, config.num_experts_per_tok)
                for number in range(config.num_hidden_layers)
            ),
        )

    def run_all(self, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[Run]:
        """Answer user messages, each a chat of its own, in their order."""
        for start in range(0, len(prompts), BATCH):
            yield from self._run_batch(prompts[start : start + BATCH], max_new_tokens)

    @torch.no_grad()
    def _run_batch(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[Run]:
        texts = [self._chat(prompt) for prompt in prompts]
        padded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        width = padded.input_ids.shape[1]
        ids_BT = self.model.generate(
            padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for row, text in enumerate(texts):
            prompt_ids = self.tokenizer.encode(text)
            output_ids = self._up_to_end(ids_BT[row, width:].tolist())
            fed = torch.tensor([prompt_ids + output_ids[:-1]])
            output = self.tokenizer.decode(output_ids, skip_special_tokens=True)
            yield Run(self._routing(fed, len(prompt_ids)), output)

    def _chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return str(text)

    def _up_to_end(self, ids: list[int]) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        stop = next((at for at, token in enumerate(ids, 1) if token in ends), len(ids))
        return ids[:stop]

    def _routing(self, fed: torch.Tensor, num_prompt_tokens: int) -> Routing:
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_module: object, _inputs: object, result: tuple[torch.Tensor, ...]) -> None:
            chosen.append((result[2], result[1]))

        hooks = [layer.mlp.gate.register_forward_hook(keep) for layer in self.model.model.layers]
        self.model(fed, use_cache=False)
        for hook in hooks:
            hook.remove()
        return Routing(
            torch.stack([ids_TK for ids_TK, _ in chosen], 1).numpy().astype(np.int32),
            torch.stack([weights_TK for _, weights_TK in chosen], 1).float().numpy(),
            num_prompt_tokens,
        )
