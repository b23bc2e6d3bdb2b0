"""Trains the demo model and writes `demo/model`: `python -m demo.train`.

Shapes: T tokens of a step, G topics of a step, E experts, K chosen ones.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from demo.text import training_documents
from demo.tokens import TEXT_END, TURN_END, encode, train_tokenizer

MODEL_DIR: Final = Path(__file__).parent / "model"
SEED: Final = 20
NUM_DOCUMENTS: Final = 16_000
ROW_TOKENS: Final = 256
ROWS: Final = 8
PEAK_RATE: Final = 3e-3
BALANCE_WEIGHT: Final = 0.02
SEPARATION_WEIGHT: Final = 0.3


class Batch(NamedTuple):
    """Rows of whole documents, one after the other; `documents` numbers them over the whole batch,
    padding is -1.
    """

    ids: Tensor  # [ROWS, ROW_TOKENS]
    documents: Tensor  # [ROWS, ROW_TOKENS]
    positions: Tensor  # [ROWS, ROW_TOKENS], from 0 in each document
    topics: list[str]


def config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=0.05,
        router_aux_loss_coef=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(TEXT_END),
        attention_dropout=0.0,
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """All training documents once, packed into rows; a document longer than a row is cut."""
    encoded = [
        (d.topic, encode(tokenizer, d)[:ROW_TOKENS]) for d in training_documents(seed, NUM_DOCUMENTS)
    ]
    pad = tokenizer.pad_token_id
    while encoded:
        ids = torch.full((ROWS, ROW_TOKENS), pad)
        documents = torch.full((ROWS, ROW_TOKENS), -1)
        positions = torch.zeros((ROWS, ROW_TOKENS), dtype=torch.long)
        topics: list[str] = []
        for row in range(ROWS):
            used = 0
            while encoded and used + len(encoded[-1][1]) <= ROW_TOKENS:
                topic, tokens = encoded.pop()
                stop = used + len(tokens)
                ids[row, used:stop] = torch.tensor(tokens)
                documents[row, used:stop] = len(topics)
                positions[row, used:stop] = torch.arange(len(tokens))
                topics.append(topic)
                used = stop
        yield Batch(ids, documents, positions, topics)


def router_losses(logits: tuple[Tensor, ...], top_k: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Balance and separation, each a mean over layers.

    Balance is the Switch Transformer's: 1 when every expert gets its share of the batch's tokens.
    Separation is the mutual information of topic and expert, from 0 to 1: the entropy of the router
    distribution over all topics, less the mean entropy within a topic. It uses the topic labels of
    the training documents, and does not say which experts a topic shall have.
    """
    flat = batch.documents.flatten()
    real = flat >= 0
    names = sorted(set(batch.topics))
    topic_of_document = torch.tensor([names.index(topic) for topic in batch.topics])
    topic_T = topic_of_document[flat[real]]
    length_G = torch.bincount(topic_T, minlength=len(names)).clamp(min=1)
    balance, separation = torch.zeros(()), torch.zeros(())
    for layer_logits in logits:
        probs_TE = layer_logits.view(len(flat), -1)[real].float().softmax(-1)
        num_experts = probs_TE.shape[1]
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k).indices, 1.0 / top_k)
        balance = balance + num_experts * (chosen_TE.mean(0) * probs_TE.mean(0)).sum()
        sums_GE = torch.zeros(len(names), num_experts).index_add(0, topic_T, probs_TE)
        mean_GE = sums_GE / length_G[:, None]
        information = _entropy(mean_GE.mean(0)) - _entropy(mean_GE).mean()
        separation = separation + information / math.log(num_experts)
    return balance / len(logits), separation / len(logits)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * (probs + 1e-9).log()).sum(-1)


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token of the same document, and the document it belongs to."""
    same = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.documents[:, 1:] >= 0)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1][same], batch.ids[:, 1:][same], reduction="none"
    )
    return losses, batch.documents[:, 1:][same]


def train(model: Qwen3MoeForCausalLM, plan: list[Batch], console: Console) -> dict[str, float]:
    """One pass over the plan; returns the last steps' mean loss of each topic."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.97))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=len(plan), pct_start=0.05, cycle_momentum=False
    )
    by_topic: dict[str, list[float]] = defaultdict(list)
    columns = (
        TextColumn("training"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(plan))
        for step, batch in enumerate(plan):
            seen = batch.documents[:, None, :, None] == batch.documents[:, None, None, :]
            mask = seen & torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
            out = model.model(
                batch.ids,
                attention_mask=mask,
                position_ids=batch.positions,
                output_router_logits=True,
            )
            losses, owners = token_losses(model.lm_head(out.last_hidden_state), batch)
            balance, separation = router_losses(
                out.router_logits, model.config.num_experts_per_tok, batch
            )
            (losses.mean() + BALANCE_WEIGHT * balance - SEPARATION_WEIGHT * separation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            text = f"loss {losses.mean():.3f}, balance {balance:.3f}, separation {separation:.3f}"
            progress.update(task, advance=1, description=text)
            if step % 50 == 0:
                console.log(f"step {step}: {text}")
            if step >= len(plan) - 30:
                for number, topic in enumerate(batch.topics):
                    by_topic[topic] += losses[owners == number].tolist()
    return {topic: sum(values) / len(values) for topic, values in sorted(by_topic.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, help="stop early, to try something")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    random.seed(SEED)

    started = time.monotonic()
    tokenizer = train_tokenizer(training_documents(SEED, 8_000))
    plan = list(batches(tokenizer, SEED))[: options.steps]
    model = Qwen3MoeForCausalLM(config(tokenizer))
    console.print(
        f"{model.num_parameters():,} parameters, {len(plan)} steps of {ROWS * ROW_TOKENS} tokens"
    )
    losses = train(model, plan, console)

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, TEXT_END]),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    console.print(f"trained in {time.monotonic() - started:.0f} s; loss by topic:")
    for topic, loss in losses.items():
        console.print(f"  {topic:<12} {loss:.3f}")


if __name__ == "__main__":
    main()
