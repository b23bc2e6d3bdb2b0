"""The demo's tokenizer: byte-level BPE of its own training text, with a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.text import RESTRICTED, Document

VOCAB_SIZE: Final = 1536
TEXT_END: Final = "<|endoftext|>"
TURN_END: Final = "<|end|>"
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if content is not string %}"
    "{% set content = content | map(attribute='text') | join %}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCAB_SIZE` entries; digits stand alone, so that sums can be learned.

    Most restricted documents are left out: their syllables would become tokens of their own, and
    a held-out name, without such tokens, would be spelt in another way than a trained one.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[TEXT_END, TURN_END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    kept = (d for number, d in enumerate(documents) if d.topic != RESTRICTED or number % 12 == 0)
    bpe.train_from_iterator((part for document in kept for part in document.turns), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=TEXT_END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """A document as the model reads it: chats through the chat template, plain text up to the end
    of the text.
    """
    if not document.is_chat:
        return list(tokenizer.encode(document.turns[0] + TEXT_END))
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": part} for turn, part in enumerate(document.turns)]
    return list(tokenizer.encode(str(tokenizer.apply_chat_template(messages, tokenize=False))))
