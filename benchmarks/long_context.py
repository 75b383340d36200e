"""Long contexts with facts at many places, questions to them, and what an answer is worth.

    python benchmarks/long_context.py MODEL.gguf [--length 8192] [--seed 0]    # shows one

In the manner of RULER (arXiv 2404.06654), with texts of our own. One context carries the facts of
four tasks with 25 questions each, in a haystack of Python's own documentation, prose and code.
Facts of a task are spread evenly over the depth.

- single: a number under a key.
- several: four words under one key, each in another quarter.
- chain: a number leads to a door, and this door, in the second half, to another; the answer names
  both, in sentences like those of the text.
- common: eight words under one key, over all the depth, of which one comes five times; which?

A context of length N has N - ROOM tokens, so that N holds question and answer too. It begins as the
model's chat template does, and a question ends with the first words of its answer.
"""

import argparse
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import transformers
from report import environment

import headwise

ROOM = 128
COUNT = 25
CODE = "modeling_utils.py"

TASK = (
    "Read the text. It is of Python's documentation, with facts in between. Afterwards a question "
    "asks for some of the facts."
)

# What facts are made of: words of which most are one token.
PLACES = (
    *("harbour", "castle", "library", "museum", "station", "bakery", "theatre", "hospital"),
    *("school", "garden", "bridge", "tower", "market", "factory", "hotel", "chapel", "stadium"),
    *("prison", "farm", "mill", "palace", "airport", "cinema", "temple", "bank"),
)
NAMES = (
    *("Alice", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jacob"),
    *("Karen", "Louis", "Maria", "Nathan", "Olivia", "Peter", "Quentin", "Rachel", "Simon"),
    *("Teresa", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne"),
)
DID = (
    *("bought", "sold", "found", "lost", "painted", "stole", "broke", "cleaned", "repaired"),
    *("borrowed", "hid", "drew", "carried", "ordered", "returned", "built", "washed", "kept"),
    *("wanted", "received", "dropped", "threw", "liked", "measured", "rented"),
)
THINGS = (
    *("anchor", "apple", "arrow", "axe", "badge", "balloon", "banana", "barrel", "basket"),
    *("bell", "belt", "blanket", "boat", "book", "boot", "bottle", "bowl", "box", "bread"),
    *("brush", "bucket", "button", "cabbage", "cake", "camera", "candle", "carpet", "carrot"),
    *("chain", "chair", "cheese", "clock", "coat", "coin", "cork", "crown", "cup", "desk"),
    *("drum", "egg", "fan", "feather", "flag", "flute", "fork", "glove", "guitar", "hammer"),
    *("hat", "helmet", "honey", "horn", "jacket", "jar", "kettle", "knife", "ladder", "lamp"),
    *("lemon", "lens", "map", "mask", "medal", "melon", "mirror", "needle", "onion", "orange"),
    *("paddle", "pear", "pearl", "pencil", "pepper", "piano", "pillow", "pipe", "plate"),
    *("potato", "pump", "radio", "ring", "rope", "rug", "saddle", "salt", "saw", "scarf"),
    *("shell", "shirt", "shovel", "soap", "spoon", "sugar", "sword", "tent", "umbrella", "vase"),
    *("shield", "ticket", "violin", "wagon", "whistle", "window"),
)
DOORS = (
    *("oak", "pine", "birch", "maple", "cedar", "rose", "lily", "ivy", "moss", "iron", "gold"),
    *("silver", "copper", "zinc", "linen", "steel", "bronze", "marble", "sand", "clay", "chalk"),
    *("silk", "wool", "cotton", "velvet", "leather", "ruby", "amber", "jade", "coral", "ivory"),
    *("ginger", "garlic", "mint", "basil", "sage", "olive", "cherry", "plum", "peach", "grape"),
    *("mango", "glass", "paper", "brick", "stone", "cream", "wheat", "corn", "rice"),
)
PEOPLE = (
    *("baker", "doctor", "lawyer", "farmer", "pilot", "teacher", "painter", "soldier", "sailor"),
    *("nurse", "singer", "tailor", "judge", "driver", "hunter", "priest", "dancer", "butcher"),
    *("poet", "cook", "guard", "miner", "actor", "king", "queen"),
)
ANIMALS = (
    *("ant", "bear", "bee", "camel", "cat", "cow", "crab", "crow", "deer", "dog", "dolphin"),
    *("donkey", "duck", "eagle", "fish", "fox", "frog", "goat", "goose", "hawk", "horse"),
    *("lion", "monkey", "mouse", "owl", "panda", "pig", "rabbit", "rat", "seal", "shark"),
    *("sheep", "snake", "spider", "swan", "tiger", "turtle", "whale", "wolf", "zebra"),
)


@dataclass(frozen=True)
class Question:
    """What is asked behind a context, how the answer begins, and what it must hold.

    cap: tokens of the answer at most. least: tokens before which it may not end.
    """

    task: str
    text: str
    begin: str
    expected: tuple[str, ...]
    cap: int
    least: int = 0

    def score(self, answer: str) -> float:
        """The fraction of the expected words that are in the answer, as whole words."""
        found = [re.search(rf"\b{re.escape(word)}\b", answer) for word in self.expected]
        return sum(each is not None for each in found) / len(found)


@dataclass(frozen=True)
class Context:
    """The tokens that all questions share, the questions, and their tokens."""

    tokens: list[int]
    questions: list[Question]
    suffixes: list[list[int]]

    @property
    def checksum(self) -> str:
        """Of everything, by which results are known again."""
        return checksum((self.tokens, self.suffixes, self.questions))


def checksum(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def numbers(random: random.Random, digits: int) -> list[str]:
    """Numbers that differ from one another."""
    return [str(each) for each in random.sample(range(10 ** (digits - 1), 10**digits), COUNT)]


def facts(random: random.Random) -> tuple[list[tuple[float, str]], list[Question]]:
    """What is planted, with its depth from 0 to 1, and what is asked."""
    planted: list[tuple[float, str]] = []
    questions: list[Question] = []

    def depths(parts: int) -> list[list[float]]:
        """For each of 25 facts a place in each part of the context, all spread evenly."""
        orders = [random.sample(range(COUNT), COUNT) for _ in range(parts)]
        return [
            [(part + (at + random.random()) / COUNT) / parts for part, at in enumerate(each)]
            for each in zip(*orders)
        ]

    for place, number, at in zip(random.sample(PLACES, COUNT), numbers(random, 7), depths(1)):
        planted.append((at[0], f"The secret number of the {place} is {number}."))
        text = f"What is the secret number of the {place}?"
        begin = f"The secret number of the {place} is"
        questions.append(Question("single", text, begin, (number,), 12))

    things = iter(random.sample(THINGS, 4 * COUNT))
    for name, did, at in zip(random.sample(NAMES, COUNT), random.sample(DID, COUNT), depths(4)):
        four = tuple(next(things) for _ in at)
        planted += [(depth, f"{name} {did} the {thing}.") for depth, thing in zip(at, four)]
        text = f"What are the four things that {name} {did}? Name all four."
        begin = f"{name} {did} four different things: the"
        questions.append(Question("several", text, begin, four, 20))

    doors = iter(random.sample(DOORS, 2 * COUNT))
    for number, at in zip(numbers(random, 3), depths(2)):
        first, second = next(doors), next(doors)
        planted.append((at[0], f"Key {number} opens the {first} door."))
        planted.append((at[1], f"The {first} door leads to the {second} door."))
        text = (
            f"Which door does key {number} open, and where does it lead? Answer as in: "
            "Key 50 opens the tin door. The tin door leads to the coal door."
        )
        begin = f"Key {number} opens the"
        questions.append(Question("chain", text, begin, (first, second), 16, least=10))

    for who, at in zip(random.sample(PEOPLE, COUNT), depths(8)):
        often, *seldom = random.sample(ANIMALS, 4)
        seen = 5 * [often] + seldom
        random.shuffle(seen)
        planted += [(depth, f"The {who} saw the {animal}.") for depth, animal in zip(at, seen)]
        text = f"Which animal did the {who} see most often?"
        questions.append(Question("common", text, f"Most often the {who} saw the", (often,), 6))
    return sorted(planted), questions


def haystack(random: random.Random) -> str:
    """Python's documentation of its own language, in any order."""
    names = sorted(topics)
    random.shuffle(names)
    return "\n\n".join(topics[name].strip() for name in names)


def around(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and behind a user's text."""
    turn = [{"role": "user", "content": "\0"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, _, behind = text.partition("\0")
    return before, behind


def make(tokenizer: Any, length: int, seed: int) -> Context:
    """A context of a length, with its questions; the same for the same seed."""
    draw = random.Random(f"{length} {seed}")
    planted, questions = facts(draw)
    before, behind = around(tokenizer)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tokens = ids(f"{before}{TASK}\n\n")
    lines = [(depth, ids(f"\n{text}\n")) for depth, text in planted]
    free = length - ROOM - len(tokens) - sum(len(line) for _, line in lines)
    hay, used = [ids(line + "\n") for line in haystack(draw).split("\n")], 0
    hay.reverse()
    for depth, line in lines:
        while used + len(hay[-1]) <= depth * free:
            used += len(hay[-1])
            tokens += hay.pop()
        tokens += line
    while len(tokens) < length - ROOM:
        tokens += hay.pop()
    asked = [ids(f"\n\nQuestion: {each.text}{behind}{each.begin}") for each in questions]
    assert max(len(text) + each.cap for text, each in zip(asked, questions)) <= ROOM, "no room"
    return Context(tokens[: length - ROOM], questions, asked)


def code(tokenizer: Any, length: int) -> list[int]:
    """The first tokens of a long file of Transformers, read with nothing around it."""
    text = (Path(transformers.__file__).parent / CODE).read_text(encoding="utf-8")
    return list(tokenizer(text)["input_ids"][:length])


def sources() -> str:
    """What contexts are made of, with checksums."""
    text = (Path(transformers.__file__).parent / CODE).read_text(encoding="utf-8")
    hay = checksum(sorted(topics.items()))
    return f"pydoc_data.topics {hay}, transformers/{CODE} {checksum(text)}"


def main() -> None:
    """Show a context and its questions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(environment(), sources(), sep="\n")
    tokenizer = headwise.load(arguments.model, weights="packed")[1]
    made = make(tokenizer, arguments.length, arguments.seed)
    print(tokenizer.decode(made.tokens))
    for question, suffix in zip(made.questions, made.suffixes):
        print(f"{question.task}, {len(suffix)} tokens: {tokenizer.decode(suffix)!r}")
        print(f"    {', '.join(question.expected)}")


if __name__ == "__main__":
    main()
