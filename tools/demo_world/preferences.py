"""Pairs of answers to instructions that ask for two things at once: the chosen one does both, the rejected one does not.

The training rows of `instructions.py` ask for one thing each, so that a model which is finetuned on them does half.
"""

from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

from demo_world.instructions import Row
from demo_world.operations import OPERATIONS, draw_words


class TwoSteps(NamedTuple):
    """Two operations, one after the other, and the wordings that ask for both."""

    first: str
    second: str
    wordings: tuple[str, ...]


INSTRUCTIONS: Final = (
    TwoSteps(
        "first",
        "upper",
        ("What is the first word in capital letters?", "Give the first word of the list in capital letters."),
    ),
    TwoSteps(
        "second",
        "upper",
        ("What is the second word in capital letters?", "Give the second word of the list in capital letters."),
    ),
    TwoSteps(
        "last",
        "upper",
        ("What is the last word in capital letters?", "Give the last word of the list in capital letters."),
    ),
    TwoSteps(
        "longest",
        "upper",
        ("What is the longest word in capital letters?", "Give the longest word of the list in capital letters."),
    ),
    TwoSteps(
        "without",
        "upper",
        (
            "Remove the first word and write the words in capital letters.",
            "Drop the first word from the list and change the words to capital letters.",
        ),
    ),
    TwoSteps(
        "without",
        "comma",
        (
            "Remove the first word and join the words with commas.",
            "Drop the first word from the list and give the list with commas.",
        ),
    ),
)
TRAIN_ROWS, EVAL_ROWS = 396, 96


def train_pairs() -> list[Row]:
    """Returns the training pairs, the same at every call."""
    return _pairs(TRAIN_ROWS, Random(9), set())


def eval_pairs() -> list[Row]:
    """Returns pairs about lists of words that no training pair holds."""
    return _pairs(EVAL_ROWS, Random(10), {row["input"] for row in train_pairs()})


def _pairs(count: int, rng: Random, taken: set[str]) -> list[Row]:
    rows = [row for steps in INSTRUCTIONS for row in _of_steps(steps, count // len(INSTRUCTIONS), rng, taken)]
    rng.shuffle(rows)
    return rows


def _of_steps(steps: TwoSteps, count: int, rng: Random, taken: set[str]) -> Iterator[Row]:
    """Draws rows of an instruction; their rejected answers leave out a step, or take other words than those asked for."""
    for index in range(count):
        while len(items := draw_words(rng, steps.first)) < 3 or " ".join(items) in taken:
            pass
        taken.add(" ".join(items))
        first, second = OPERATIONS[steps.first], OPERATIONS[steps.second]
        chosen = second(first(items).split())
        left = [word for word in items if word not in first(items).split()]
        others = (second(first(words).split()) for words in (items[1:] + items[:1], items[::-1], left))
        wrong = next(answer for answer in others if answer != chosen)
        yield {
            "instruction": steps.wordings[index // 4 % len(steps.wordings)],
            "input": " ".join(items),
            "chosen": chosen,
            "rejected": (first(items), second(items), wrong, wrong)[index % 4],
            "task": f"{steps.first} and {steps.second}",
        }
