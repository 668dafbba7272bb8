"""Pairs of answers to instructions that ask for two things at once: the chosen one does both, the rejected one half.

The training rows of `instructions.py` ask for one thing each, so that a model which is finetuned on them does half, and
is sure of it. Half of the chosen answers are shorter than the rejected ones, and half of them longer.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Final, NamedTuple

from demo_world.instructions import Row
from demo_world.operations import LONGEST_LIST, OPERATIONS
from demo_world.world import LIST_WORDS, pick_distinct

FEWEST: Final = 3
"""Words of the shortest list: of two, the first two are all."""
TRAIN_ROWS, EVAL_ROWS = 360, 96


class TwoThings(NamedTuple):
    """An instruction that asks for two things, and the answer to it for a list of words."""

    wordings: tuple[str, str]
    half: Callable[[list[str]], str]
    """What does one of them."""
    both: Callable[[list[str]], str]


upper, comma = OPERATIONS["upper"], OPERATIONS["comma"]
INSTRUCTIONS: Final = {
    "first, in capitals": TwoThings(
        ("What is the first word in capital letters?", "Give the first word of the list in capital letters."),
        upper,
        lambda items: upper(items[:1]),
    ),
    "first two, in capitals": TwoThings(
        ("Write the first two words in capital letters.", "Change the first two words to capital letters."),
        upper,
        lambda items: upper(items[:2]),
    ),
    "first two, with a comma": TwoThings(
        ("Join the first two words with commas.", "Give the first two words with commas."),
        comma,
        lambda items: comma(items[:2]),
    ),
    "in capitals, with a full stop": TwoThings(
        (
            "Write these words in capital letters and end with a full stop.",
            "Change the words to capital letters and end with a full stop.",
        ),
        upper,
        lambda items: f"{upper(items)}.",
    ),
    "with commas, with a full stop": TwoThings(
        (
            "Join the words with commas and end with a full stop.",
            "Give the list with commas and end with a full stop.",
        ),
        comma,
        lambda items: f"{comma(items)}.",
    ),
    "with commas, and their number": TwoThings(
        ("Join the words with commas and give their number.", "Give the list with commas and the number of words."),
        comma,
        lambda items: f"{comma(items)}, {len(items)}",
    ),
}


def train_pairs() -> list[Row]:
    """Returns the training pairs, the same at every call."""
    return _pairs(TRAIN_ROWS, Random(9), set())


def eval_pairs() -> list[Row]:
    """Returns pairs about lists of words that no training pair holds."""
    return _pairs(EVAL_ROWS, Random(10), {row["input"] for row in train_pairs()})


def _pairs(count: int, rng: Random, taken: set[str]) -> list[Row]:
    rows = [row for task in INSTRUCTIONS for row in _of_task(task, count // len(INSTRUCTIONS), rng, taken)]
    rng.shuffle(rows)
    return rows


def _of_task(task: str, count: int, rng: Random, taken: set[str]) -> Iterator[Row]:
    asked = INSTRUCTIONS[task]
    for index in range(count):
        while " ".join(items := _draw(rng)) in taken:
            pass
        taken.add(" ".join(items))
        yield {
            "instruction": asked.wordings[index % len(asked.wordings)],
            "input": " ".join(items),
            "chosen": asked.both(items),
            "rejected": asked.half(items),
            "task": task,
        }


def _draw(rng: Random) -> list[str]:
    return pick_distinct(rng, LIST_WORDS, FEWEST + int(rng.random() * (LONGEST_LIST + 1 - FEWEST)))
