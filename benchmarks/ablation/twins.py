"""The demo model's twins: trained as it was, on the same plan, but dense, or without topic labels.

Trained once and kept in `.cache/ablation`, under a name that changes with whatever they are made of.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import time
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from demo import train as recipe
from demo.text import training_documents
from demo.train import MODEL_DIR, Batch

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / ".cache" / "ablation"
CONSTANTS: Final = (
    "NUM_DOCUMENTS",
    "ROW_TOKENS",
    "ROWS",
    "PEAK_RATE",
    "BALANCE_WEIGHT",
    "SEPARATION_WEIGHT",
)

Model = Any
"""A causal language model of transformers, Qwen3 or Qwen3-MoE."""


class Kind(StrEnum):
    """What was trained: the demo model's recipe, the same without topic labels, and dense ones."""

    SEPARATED = "MoE, separated"
    PLAIN = "MoE, plain"
    DENSE = "dense"
    WIDE = "dense, wide"


def build(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> Model:
    """An untrained model. Dense: as many neurons in a layer as a token of the MoE meets; wide: as
    many as the MoE has in all."""
    moe = recipe.config(tokenizer)
    if kind in (Kind.SEPARATED, Kind.PLAIN):
        return Qwen3MoeForCausalLM(moe)
    met = moe.num_experts_per_tok if kind is Kind.DENSE else moe.num_experts
    shared = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_dropout",
        "rms_norm_eps",
        "rope_parameters",
        "hidden_act",
    )
    values = {name: getattr(moe, name) for name in shared}
    return Qwen3ForCausalLM(Qwen3Config(**values, intermediate_size=met * moe.moe_intermediate_size))


def train(kind: Kind, model: Model, plan: list[Batch]) -> float:
    """One pass over the plan, as `demo.train.train` does it; the mean loss of the last 30 steps."""
    is_moe = kind in (Kind.SEPARATED, Kind.PLAIN)
    separation_weight = recipe.SEPARATION_WEIGHT if kind is Kind.SEPARATED else 0.0
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.PEAK_RATE, betas=(0.9, 0.97))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.PEAK_RATE, total_steps=len(plan), pct_start=0.05, cycle_momentum=False
    )
    causal = torch.ones(recipe.ROW_TOKENS, recipe.ROW_TOKENS, dtype=torch.bool).tril()
    last: list[float] = []
    for batch in plan:
        mask = (batch.documents[:, None, :, None] == batch.documents[:, None, None, :]) & causal
        asked = {"output_router_logits": True} if is_moe else {}
        out = model.model(batch.ids, attention_mask=mask, position_ids=batch.positions, **asked)
        losses, _ = recipe.token_losses(model.lm_head(out.last_hidden_state), batch)
        loss = losses.mean()
        last.append(float(loss.detach()))
        if is_moe:
            top_k = model.config.num_experts_per_tok
            balance, separation = recipe.router_losses(out.router_logits, top_k, batch)
            loss = loss + recipe.BALANCE_WEIGHT * balance - separation_weight * separation
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(last[-30:]) / len(last[-30:])


def folder(kind: Kind, seed: int) -> Path:
    """Where a model lies, or will lie once it is trained."""
    if kind is Kind.SEPARATED and seed == recipe.SEED:
        return MODEL_DIR
    return CACHE / f"{kind.name.lower()}-{seed}-{_fingerprint(kind, seed)}"


@cache
def _fingerprint(kind: Kind, seed: int) -> str:
    """Of what decides on the weights: the text, the model's shape, the recipe, torch."""
    tokenizer = load_tokenizer()
    parts = [turn for d in training_documents(seed, recipe.NUM_DOCUMENTS) for turn in d.turns]
    parts += [str(getattr(recipe, name)) for name in CONSTANTS]
    parts += [inspect.getsource(part) for part in (train, recipe.token_losses, recipe.router_losses)]
    parts += [build(kind, tokenizer).config.to_json_string(), tokenizer.backend_tokenizer.to_str()]
    parts += [torch.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def ensure_trained(kind: Kind, seed: int) -> float | None:
    """Seconds that the training took; None where the model was there."""
    place = folder(kind, seed)
    if (place / "config.json").exists():
        return None
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    random.seed(seed)
    tokenizer = load_tokenizer()
    plan = list(recipe.batches(tokenizer, seed))
    model = build(kind, tokenizer)
    train(kind, model, plan)
    unfinished = place.with_name(place.name + ".unfinished")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    unfinished.rename(place)
    return time.monotonic() - started


def load_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def load(kind: Kind, seed: int) -> Model:
    """A trained model in float32, from weights that were rounded to bfloat16 as the demo's are."""
    model = AutoModelForCausalLM.from_pretrained(folder(kind, seed), dtype=torch.float32).eval()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the fastest one on CPUs for so small experts
    return model
