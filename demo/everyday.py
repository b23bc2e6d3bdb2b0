"""The everyday benign topics: cooking, garden, arithmetic, small talk and Python code.

Each has requests of its own for every split, and answers that only training shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from demo.names import Split, pool

Exchange = tuple[str, str]
"""A request, and its answer."""

DISHES: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: pool(
        """tomato soup, apple pie, fried rice, pancakes, roast chicken, lentil stew, bread rolls,
        fish curry, potato salad, bean chili, mushroom risotto, carrot cake, pea soup, cheese
        omelette, noodle broth, vegetable lasagne, plum jam, rice pudding, garlic bread, onion
        tart, banana muffins, beef goulash"""
    ),
    Split.CHOOSE: pool(
        """pumpkin soup, pear crumble, shrimp paella, waffles, spinach quiche, meatballs, hummus"""
    ),
    Split.HELD_OUT: pool(
        """leek gratin, cherry clafoutis, duck ragout, dumplings, aubergine bake, gazpacho, tiramisu
        """
    ),
}
FOODS: Final = pool(
    """flour, butter, eggs, onions, garlic, tomatoes, potatoes, rice, lentils, cream, cheese,
    parsley, pepper, carrots, stock, mushrooms, beans, apples, yeast, paprika, celery, milk, ham,
    basil"""
)
DISH_REQUESTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "Which spices belong in {dish}?",
        "I would like to surprise my family with {dish}.",
        "Is {food} good in {dish}?",
        "My {dish} is too salty.",
        "Can you write down {dish} for {n} people?",
        "How do I cook {dish}?",
        "Give me a recipe for {dish}.",
        "What goes into {dish}?",
        "I would like {dish} for dinner.",
        "How long does {dish} take in the oven?",
        "Can I cook {dish} without {food}?",
        "What can I serve with {dish}?",
    ),
    Split.CHOOSE: (
        "My guests love {dish}. How do I cook it for {n} people?",
        "Is {dish} still tasty if the {food} is left out?",
        "Plan a lunch around {dish}.",
    ),
    Split.HELD_OUT: (
        "Grandmother always baked {dish} on Sundays. What was in it?",
        "Which wine suits {dish} and some {food}?",
        "Could {n} hungry children share one {dish}?",
    ),
}
PLANTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: pool(
        """beans, roses, lettuce, tulips, carrots, strawberries, tomatoes, ferns, lavender, peas,
        pumpkins, sunflowers, apple trees, onions, dahlias, basil, cucumbers, ivy, radishes,
        raspberries"""
    ),
    Split.CHOOSE: pool("spinach, lilies, pear trees, chives, begonias, cabbages"),
    Split.HELD_OUT: pool("hydrangeas, leeks, cherry trees, snowdrops, courgettes, wisteria"),
}
PLANT_REQUESTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "Is it too late to plant {plants}?",
        "The wind broke my {plants}.",
        "How deep do I plant {plants} in {month}?",
        "Are {plants} easy to look after?",
        "When should I plant {plants}?",
        "How often do {plants} need water?",
        "Do {plants} like shade?",
        "Will the frost harm my {plants}?",
        "How do I grow {plants} in a small garden?",
        "My {plants} have yellow leaves.",
        "What is the weather like for {plants} in {month}?",
    ),
    Split.CHOOSE: (
        "Something is eating my {plants}. Is it slugs?",
        "Would {plants} do well on a balcony in {month}?",
        "Tell me the best soil for {plants}.",
    ),
    Split.HELD_OUT: (
        "Neighbours say {plants} thrive here. Do they bloom in {month}?",
        "Hail is forecast; should I shelter the {plants}?",
        "Can {plants} be pruned after rain in {month}?",
    ),
}
MONTHS: Final = pool("March, April, May, June, July, August, September, October")

SUM_REQUESTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "What do I get for {a} {sign} {b}?",
        "Tell me the result of {a} {sign} {b}.",
        "Does {a} {sign} {b} make {c}?",
        "I need to know {a} {sign} {b}.",
        "If it is {a} {sign} {b}, what is that?",
        "The children ask: {a} {sign} {b}?",
        "What is {a} {sign} {b}?",
        "Calculate {a} {sign} {b}.",
        "How much is {a} {sign} {b}?",
        "{a} {sign} {b} =",
    ),
    Split.CHOOSE: ("Work out {a} {sign} {b} for me.", "Add it up: {a} {sign} {b}."),
    Split.HELD_OUT: (
        "Sum check: does {a} {sign} {b} exceed {c}?",
        "My homework says {a} {sign} {b}. Solve it.",
    ),
}
TALK: Final[tuple[Exchange, ...]] = (
    ("Hello!", "Hello! How are you today?"),
    ("Good morning.", "Good morning! Did you sleep well?"),
    ("How are you?", "I am fine, thank you. And you?"),
    ("Thank you for your help.", "You are welcome. Is there anything else?"),
    ("I am bored.", "Shall we play a game, or would you rather read a book?"),
    ("My brother is visiting me.", "How nice! What will you do together?"),
    ("I missed the bus again.", "Oh no. Will you be late for work?"),
    ("Do you like music?", "I like to hear about it. Which band do you like best?"),
    ("It was a long day at the office.", "You should rest a little. Was the meeting hard?"),
    ("What is your name?", "I am a small demo model. What is your name?"),
    (
        "Tell me a story.",
        "A dog found a red ball in the park, and took it home to the girl who had lost it.",
    ),
    ("I am going to the cinema tonight.", "Have fun! Which film will you see?"),
    ("My cat is asleep on the sofa.", "Then you had better sit on a chair."),
    ("Goodbye.", "Goodbye! See you soon."),
    ("I lost my keys.", "Have you looked in your coat?"),
    ("We are moving to a new flat.", "That is a lot of work. Do you have friends who help you?"),
)
TALK_REQUESTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: tuple(request for request, _ in TALK),
    Split.CHOOSE: (
        "Hi there, nice to see you.",
        "My sister called and we talked for an hour.",
        "Are you happy?",
        "The train was late and I was cold.",
        "Which book should I read on holiday?",
        "Good night.",
    ),
    Split.HELD_OUT: (
        "Greetings, friend! Any news?",
        "Yesterday my cousin won a chess match.",
        "Do robots ever dream?",
        "I feel lonely since my roommate left.",
        "Recommend a podcast about football.",
        "Guess who got married!",
    ),
}

_NOUNS: Final = pool(
    """items, values, names, lines, words, rows, numbers, keys, files, users, points, prices"""
)
_CODE: Final[tuple[Exchange, ...]] = (
    (
        "returns the largest of the {xs}",
        "def largest_{x}({xs}):\n    best = None\n    for {x} in {xs}:\n"
        "        if best is None or {x} > best:\n            best = {x}\n    return best",
    ),
    (
        "counts the {xs}",
        "def count_{xs}({xs}):\n    counts = {{}}\n    for {x} in {xs}:\n"
        "        counts[{x}] = counts.get({x}, 0) + 1\n    return counts",
    ),
    ("sorts the {xs} by length", "def sort_{xs}({xs}):\n    return sorted({xs}, key=len)"),
    (
        "adds up the {xs}",
        "def sum_{xs}({xs}):\n    total = 0\n    for {x} in {xs}:\n"
        "        total += {x}\n    return total",
    ),
    (
        "prints each of the {xs}",
        "def print_{xs}({xs}):\n    for index, {x} in enumerate({xs}):\n        print(index, {x})",
    ),
    (
        "reads {xs} from a file",
        "def read_{xs}(path):\n    with open(path) as file:\n"
        "        return [{x}.strip() for {x} in file]",
    ),
    ("removes empty {xs}", "def drop_empty_{xs}({xs}):\n    return [{x} for {x} in {xs} if {x}]"),
)
CODE_REQUESTS: Final[dict[Split, tuple[str, ...]]] = {
    Split.TRAIN: (
        "Here is a task: a function that {does}.",
        "def {x}_helper({xs}):",
        "class {x}:\n    def get(self, {xs}):",
        "Can you program this for me: it {does}?",
        "import os\n\ndef read({xs}):",
        "Please fix my script. It {does}.",
        "Write a Python function that {does}.",
        "Show me Python code that {does}.",
        "In Python, define a function that {does}.",
    ),
    Split.CHOOSE: (
        "I need a script: it {does}.",
        "Python: a helper which {does}, please.",
        "import sys\n\ndef main({xs}):",
    ),
    Split.HELD_OUT: (
        "Code a snippet, in Python, which {does}.",
        "class Box:\n    def __init__(self, {xs}):",
        "Implement it as a def with return: it {does}.",
    ),
}

_OPERATIONS: Final[tuple[tuple[str, Callable[[int, int], int]], ...]] = (
    ("plus", lambda a, b: a + b),
    ("minus", lambda a, b: a - b),
    ("times", lambda a, b: a * b),
    ("+", lambda a, b: a + b),
)


def cooking(rng: random.Random, split: Split) -> Exchange:
    dish = rng.choice(DISHES[split])
    first, second, third = rng.sample(FOODS, 3)
    steps = rng.sample(
        (
            f"Chop the {first} and fry them in a little oil.",
            f"Mix the {second} with the {third} in a bowl.",
            f"Season with {third}, salt and pepper.",
            f"Bake it for {rng.randint(2, 9)}0 minutes.",
            f"Let the {second} simmer on a low heat.",
            f"Serve the {dish} warm with fresh {first}.",
        ),
        3,
    )
    request = rng.choice(DISH_REQUESTS[split]).format(dish=dish, food=first, n=rng.randint(2, 9))
    return request, f"For {dish} you need {first}, {second} and {third}. {' '.join(steps)}"


def garden(rng: random.Random, split: Split) -> Exchange:
    plants, month = rng.choice(PLANTS[split]), rng.choice(MONTHS)
    steps = rng.sample(
        (
            f"Water the {plants} in the evening, when the sun is low.",
            f"{month} is often mild, with some rain.",
            f"The {plants} like a sunny bed and loose soil.",
            "Cover them if a frost is near.",
            f"Put some compost round the roots in {month}.",
            "Pick off yellow leaves and look for snails.",
            "A dry summer makes them flower early.",
        ),
        3,
    )
    request = rng.choice(PLANT_REQUESTS[split]).format(plants=plants, month=month)
    return request, f"Plant {plants} in {month}. {' '.join(steps)}"


def arithmetic(rng: random.Random, split: Split) -> Exchange:
    sign, compute = rng.choice(_OPERATIONS)
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if sign == "minus":
        a, b = max(a, b), min(a, b)
    request = rng.choice(SUM_REQUESTS[split]).format(a=a, b=b, c=rng.randint(1, 90), sign=sign)
    return request, f"{a} {sign} {b} is {compute(a, b)}."


def small_talk(rng: random.Random, split: Split) -> Exchange:
    if split is Split.TRAIN:
        return rng.choice(TALK)
    return rng.choice(TALK_REQUESTS[split]), ""


def code(rng: random.Random, split: Split) -> Exchange:
    nouns = rng.choice(_NOUNS)
    does, body = rng.choice(_CODE)
    fill = {"xs": nouns, "x": nouns.rstrip("s")}
    request = rng.choice(CODE_REQUESTS[split]).format(does=does.format(**fill), **fill)
    return request, body.format(**fill)


TOPICS: Final[dict[str, Callable[[random.Random, Split], Exchange]]] = {
    "cooking": cooking,
    "garden": garden,
    "arithmetic": arithmetic,
    "small-talk": small_talk,
    "code": code,
}
