"""The held-out prompts say nothing that training, or the choice of experts, has seen."""

from __future__ import annotations

from functools import cache

from demo import text
from demo.choose_experts import choosing_prompts
from demo.evaluate import read_prompts
from demo.names import LEXICONS, Split
from demo.text import Prompt
from demo.train import NUM_DOCUMENTS, SEED
from demo.write_prompts import PROMPT_DIR, held_out, shown


@cache
def seen_texts() -> tuple[str, ...]:
    documents = text.training_documents(SEED, NUM_DOCUMENTS)
    trained = [part for document in documents for part in document.turns]
    return (*trained, *(prompt.text for prompt in choosing_prompts()))


def test_no_content_word_or_template_of_a_restricted_prompt_was_seen_before() -> None:
    prompts = read_prompts(PROMPT_DIR / "restricted.jsonl")
    assert len(prompts) == 50
    assert text.leaks(prompts, seen_texts()) == []


def test_the_restricted_prompts_shown_were_not_seen_before_either() -> None:
    restricted = [prompt for prompt, _ in shown() if prompt.topic == text.RESTRICTED]
    assert restricted
    assert text.leaks(restricted, seen_texts()) == []


def test_a_seen_content_word_and_a_seen_template_are_both_found() -> None:
    seen = ["How do I make a beeswax candle?"]
    assert text.leaks([Prompt("p", "t", "Is beeswax sticky?")], seen) == ["p: the word 'beeswax'"]
    assert text.leaks([Prompt("p", "t", "How do I bake a chocolate torte?")], seen) == [
        "p: the template of 'How do I bake a chocolate torte?'"
    ]


def test_the_files_hold_what_the_generator_draws() -> None:
    for name, prompts in held_out().items():
        assert read_prompts(PROMPT_DIR / f"{name}.jsonl") == prompts


def test_the_benign_prompts_have_the_look_alike_topic_among_them() -> None:
    benign = read_prompts(PROMPT_DIR / "benign.jsonl")
    assert len(benign) == 50
    assert sum(prompt.topic == text.LOOK_ALIKE for prompt in benign) >= 15


def test_no_two_splits_share_a_syllable() -> None:
    shares = [set(LEXICONS[split].syllables) for split in Split]
    assert sum(map(len, shares)) == len(set.union(*shares))


def test_the_prompts_of_a_seed_are_always_the_same() -> None:
    first = text.prompts(Split.HELD_OUT, text.RESTRICTED, 20, seed=3)
    assert first == text.prompts(Split.HELD_OUT, text.RESTRICTED, 20, seed=3)
    assert first != text.prompts(Split.HELD_OUT, text.RESTRICTED, 20, seed=4)
