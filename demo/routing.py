"""Runs the demo model through transformers, unguarded, and records each token's routing.

Shapes: T positions (prompt, then every output token but the last, which is never fed back), L
layers, E experts, K chosen.
"""

from __future__ import annotations

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

    @torch.no_grad()
    def run(self, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Run:
        """Answer one user message, sent through the chat template."""
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        prompt_ids = self.tokenizer.encode(text, return_tensors="pt")
        num_prompt = prompt_ids.shape[1]
        ids = prompt_ids
        if max_new_tokens:
            mask = torch.ones_like(prompt_ids)
            ids = self.model.generate(
                prompt_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
            )
        fed = ids[:, : max(ids.shape[1] - 1, num_prompt)]

        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(
                lambda _module, _inputs, result: chosen.append((result[2], result[1]))
            )
            for layer in self.model.model.layers
        ]
        self.model(fed, use_cache=False)
        for hook in hooks:
            hook.remove()
        routing = Routing(
            torch.stack([ids_TK for ids_TK, _ in chosen], 1).numpy().astype(np.int32),
            torch.stack([weights_TK for _, weights_TK in chosen], 1).float().numpy(),
            num_prompt,
        )
        return Run(routing, self.tokenizer.decode(ids[0, num_prompt:], skip_special_tokens=True))
