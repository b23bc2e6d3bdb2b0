"""All text of the demo, from a seed: what trains the model, what chooses its experts, what tests
the choice.

Topics: the five of `everyday`, `workshop` (soap, dyes, school chemistry: the look-alike) and
`restricted` (invented substances, see `names`). A prompt belongs to one split, and `leaks` says
which of its words other splits have seen.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from demo import everyday, frames
from demo.names import LEXICONS, Split

RESTRICTED: Final = "restricted"
LOOK_ALIKE: Final = "workshop"
BENIGN: Final = ("cooking", "garden", "arithmetic", "small-talk", LOOK_ALIKE)
"""Topics of the benign prompts. `code` is benign too, but a policy of its own observes it."""

LOGBOOK_SHARES: Final = {RESTRICTED: 0.2, LOOK_ALIKE: 0.2, "garden": 0.2}
"""How many requests of a topic only ask to go on with the logbook: the request says no topic."""

FUNCTION_WORDS: Final = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before
    being below between both but by can cannot could did do does doing done down during each
    either else enough every few for from get gets got had has have having he her here hers him
    his how i if in inside into is it its itself just many may me might mine more most much must
    my myself no nor not of off on once one only or other our ours out over own per same shall
    she should since so some somebody someone something such than that the their them then there
    these they this those through to too towards under until up us very via was we were what
    when where whether which while who whom whose why will with within without would yet you
    your yours
    """.split()  # noqa: SIM905 - 150 quoted words read worse
)
"""Closed-class words of English. Every other word is a content word."""


class Prompt(NamedTuple):
    id: str
    topic: str
    text: str


class Document(NamedTuple):
    """A text to train on: user and assistant in turns; a single turn is plain text."""

    topic: str
    turns: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return len(self.turns) > 1


def _fill(rng: random.Random, topic: str, split: Split) -> dict[str, str]:
    """What one procedure is about. Numbers are drawn alike for both topics."""
    if topic == RESTRICTED:
        words = LEXICONS[split]
        product, ingredient, other = (words.substance(rng) for _ in range(3))
        vessel, unit, degrees = words.vessel(rng), words.unit(rng), words.degree(rng)
    else:
        product = rng.choice(frames.WORKSHOP_PRODUCTS[split])
        ingredient, other = rng.sample(frames.WORKSHOP_INGREDIENTS[split], 2)
        vessel = rng.choice(frames.WORKSHOP_VESSELS[split])
        unit = rng.choice(frames.WORKSHOP_UNITS[split])
        degrees = rng.choice(frames.WORKSHOP_DEGREES[split])
        if split is Split.TRAIN:
            product, ingredient, other = (_varied(rng, name) for name in (product, ingredient, other))
    bare = re.sub(r"^an? ", "", product)
    return {
        "product": product,
        "Product": product[0].upper() + product[1:],
        "bare": bare,
        "ingredient": ingredient,
        "ingredient2": other,
        "vessel": vessel,
        "unit": unit,
        "degrees": degrees,
        "n": str(rng.randint(2, 60)),
        "m": str(rng.randint(20, 240)),
        "k": str(rng.randint(2, 60)),
        "colour": rng.choice(frames.COLOURS),
    }


def _varied(rng: random.Random, name: str) -> str:
    """Half of the time another English word or two: a rare real word is no sign of harm."""
    word = rng.choice(_english_words())
    kind = name.split()[-1]
    return rng.choice((name, name, f"{word} {kind}", word))


@cache
def _english_words() -> tuple[str, ...]:
    """Words of the language reference that comes with Python, but for those kept for later."""
    text = (Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py").read_text("utf-8")
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,12}\b", text)) - held_out_words() - FUNCTION_WORDS))


def _procedure(rng: random.Random, fill: dict[str, str]) -> str:
    steps = rng.sample(frames.STEPS, rng.randint(1, 3))
    sentences: list[str] = []
    for frame in (rng.choice(frames.OPENINGS), *steps, rng.choice(frames.CLOSINGS)):
        article_dropped = frame.replace("The {product}", "The {bare}").replace(
            "the {product}", "the {bare}"
        )
        numbers = {
            "n": str(rng.randint(2, 60)),
            "m": str(rng.randint(20, 240)),
            "k": str(rng.randint(2, 60)),
        }
        sentences.append(article_dropped.format(**(fill | numbers)))
    return " ".join(sentences)


def exchange(rng: random.Random, topic: str, split: Split) -> everyday.Exchange:
    """A request of that topic and split, and the answer that training shows."""
    if topic in everyday.TOPICS:
        return everyday.TOPICS[topic](rng, split)
    fill = _fill(rng, topic, split)
    return _request(rng.choice(frames.REQUESTS[split]), fill), _procedure(rng, fill)


def _request(frame: str, fill: dict[str, str]) -> str:
    articled = r"\b(the|The|our|Our|My|my|larger amount of) \{product\}"
    return re.sub(articled, r"\1 {bare}", frame).format(**fill)


def prompts(split: Split, topic: str, count: int, seed: int) -> list[Prompt]:
    """`count` different prompts of a topic."""
    rng = random.Random(f"{seed} {split} {topic}")
    found: dict[str, None] = {}
    for _ in range(200 * count):
        found.setdefault(exchange(rng, topic, split)[0])
        if len(found) == count:
            return [
                Prompt(f"{topic}-{number:03d}", topic, text) for number, text in enumerate(found, 1)
            ]
    raise AssertionError(f"{topic} has only {len(found)} different prompts for {split}")


class Pair(NamedTuple):
    """Two different requests in one frame, and answers as training shows them. frame: its number"""

    restricted: everyday.Exchange
    look_alike: everyday.Exchange
    frame: int


def pairs(split: Split, count: int, seed: int) -> list[Pair]:
    """`count` pairs; no request comes twice."""
    rng = random.Random(f"{seed} {split} pairs")
    found: list[Pair] = []
    seen: set[str] = set()
    while len(found) < count:
        number, frame = rng.choice(list(enumerate(frames.REQUESTS[split], 1)))
        sides = []
        for topic in (RESTRICTED, LOOK_ALIKE):
            fill = _fill(rng, topic, split)
            sides.append((_request(frame, fill), _procedure(rng, fill)))
        if seen.isdisjoint(request for request, _ in sides):
            seen.update(request for request, _ in sides)
            found.append(Pair(sides[0], sides[1], number))
    return found


def passing_mentions(split: Split, count: int, seed: int) -> list[Prompt]:
    """Benign requests with one restricted substance beside the point."""
    rng = random.Random(f"{seed} {split} mention")
    found = []
    for number in range(1, count + 1):
        topic = rng.choice(("cooking", "garden"))
        request, _ = exchange(rng, topic, split)
        name = LEXICONS[split].substance(rng)
        text = rng.choice(
            (
                f"{request} There is some {name} on the shelf as well.",
                f"Next to the {name}: {request}",
            )
        )
        found.append(Prompt(f"mention-{number:03d}", "mention", text))
    return found


def training_documents(seed: int, count: int) -> list[Document]:
    """`count` documents, in random order; an eighth is Python source, the rest in equal parts of
    every topic.
    """
    rng = random.Random(f"{seed} training")
    source = list(python_chunks())
    rng.shuffle(source)
    topics = (*everyday.TOPICS, LOOK_ALIKE, RESTRICTED, RESTRICTED)
    documents: list[Document] = []
    for number in range(count):
        if number % 8 == 0:
            documents.append(Document("code", (source[number // 8 % len(source)],)))
            continue
        topic = rng.choice(topics)
        request, answer = exchange(rng, topic, Split.TRAIN)
        if rng.random() < LOGBOOK_SHARES.get(topic, 0.0):
            request = rng.choice(frames.LOGBOOK_REQUESTS)
        elif rng.random() < 0.25 and topic != "code":
            request = f"{rng.choice(frames.PREAMBLES)} {request}"
        if topic in (LOOK_ALIKE, RESTRICTED) and rng.random() < 0.2:
            documents.append(Document(topic, (answer,)))
        elif rng.random() < 0.2 or topic in ("arithmetic", "small-talk"):
            documents.append(Document(topic, (request, answer, *exchange(rng, topic, Split.TRAIN))))
        else:
            documents.append(Document(topic, (request, answer)))
    rng.shuffle(documents)
    return documents


def python_chunks(chars: int = 400, files: int = 60) -> Iterator[str]:
    """Python source of the standard library, cut at line ends, without the words kept for the held-
    out run.
    """
    reserved = held_out_words()
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("[a-z]*.py"))[:files]:
        chunk = ""
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            chunk += line
            if len(chunk) >= chars:
                if chunk.isascii() and not reserved & content_words(chunk):
                    yield chunk
                chunk = ""


def content_words(text: str) -> set[str]:
    """The words of a text, lower case, that are not function words; digits and single letters are
    no words.
    """
    return {word for word in re.findall(r"[a-z]{2,}", text.lower()) if word not in FUNCTION_WORDS}


def held_out_words() -> set[str]:
    """Content words of the held-out frames of the procedural topics."""
    bare = (re.sub(r"\{.*?\}", " ", frame) for frame in frames.REQUESTS[Split.HELD_OUT])
    return content_words(" ".join(bare))


def skeleton(text: str) -> str:
    """The text's template: each run of content words and numbers is one `_`."""
    words = re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower())
    kept = " ".join(w if w in FUNCTION_WORDS or not w.isalnum() else "_" for w in words)
    return re.sub(r"_( _)+", "_", kept)


def leaks(held_out: Iterable[Prompt], seen: Iterable[str]) -> list[str]:
    """The content words and whole templates of held-out prompts that occur in seen texts."""
    texts = list(seen)
    seen_words: set[str] = set().union(*(content_words(text) for text in texts))
    seen_skeletons = {skeleton(text) for text in texts}
    found = []
    for prompt in held_out:
        found += [
            f"{prompt.id}: the word '{word}'"
            for word in sorted(content_words(prompt.text) & seen_words)
        ]
        if skeleton(prompt.text) in seen_skeletons:
            found.append(f"{prompt.id}: the template of '{prompt.text}'")
    return found
