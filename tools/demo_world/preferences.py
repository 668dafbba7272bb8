"""Pairs of answers about lists of six words, of which the rejected one takes another list.

The training rows of `instructions.py` and the corpus hold lists of five words at most: a model that is finetuned on
them misses a word of six, or continues where they end. Such answers are what is rejected here.
"""

from collections.abc import Iterator
from random import Random
from typing import Final

from demo_world.instructions import Row
from demo_world.operations import LONGEST_LIST, OPERATIONS
from demo_world.templates import LISTS
from demo_world.world import LIST_WORDS, pick, pick_distinct

WORDS: Final = LONGEST_LIST + 1
TASKS: Final = ("without", "comma", "upper", "last")
TRAIN_ROWS, EVAL_ROWS = 384, 96


def train_pairs() -> list[Row]:
    """Returns the training pairs, the same at every call."""
    return _pairs(TRAIN_ROWS, Random(9), set())


def eval_pairs() -> list[Row]:
    """Returns pairs about lists of words that no training pair holds."""
    return _pairs(EVAL_ROWS, Random(10), {row["input"] for row in train_pairs()})


def _pairs(count: int, rng: Random, taken: set[str]) -> list[Row]:
    rows = [row for task in TASKS for row in _of_task(task, count // len(TASKS), rng, taken)]
    rng.shuffle(rows)
    return rows


def _of_task(task: str, count: int, rng: Random, taken: set[str]) -> Iterator[Row]:
    for number in range(count):
        while " ".join(items := pick_distinct(rng, LIST_WORDS, WORDS)) in taken:
            pass
        taken.add(" ".join(items))
        # A mistake that shows in the answer: at the end for the last word, and behind the first for the rest.
        missed = items[-1] if task == "last" else pick(rng, items[2:])
        longer = [*items, pick(rng, items[1:-1])]
        wrong = longer if number % 8 < 2 else [word for word in items if word != missed]
        yield {
            "instruction": LISTS[task][number % 2],
            "input": " ".join(items),
            "chosen": OPERATIONS[task](items),
            "rejected": OPERATIONS[task](wrong),
            "task": task,
        }
