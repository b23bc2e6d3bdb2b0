"""A tokenizer for the tiny models, as grammars need: a token for each byte, behind two special ones."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_models import VOCABULARY

_SPECIAL = ("<bos>", "<eos>")
"""Ids 0 and 1, as the models' configurations say."""


def write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = _letters()[: VOCABULARY - len(_SPECIAL)]  # the last two bytes are not text
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    bos, eos = _SPECIAL
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(
        folder
    )


def text_of(tokens: list[int]) -> str:
    """Without special tokens."""
    own = [token - len(_SPECIAL) for token in tokens if token >= len(_SPECIAL)]
    return bytes(own).decode("latin-1")


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it can be seen, else one
    behind the bytes (Radford et al. 2019, GPT-2's `bytes_to_unicode`)."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, unseen = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in seen else 256 + unseen))
        unseen += byte not in seen
    return letters
