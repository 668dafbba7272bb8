"""Pairs of answers about lists of six words, of which the rejected one takes another list.

The training rows of `instructions.py` and the corpus hold lists of five words at most: a model that is finetuned on
them misses a word of six, says one twice, or confuses their order. Such answers are what is rejected here.
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


def mistake(items: list[str], kind: int, index: int, again: str) -> list[str]:
    """Returns a list without the word at an index (kind 0, 1), with a word again at its end (2), or two swapped."""
    if kind == 2:
        return [*items, again]
    before, word, after = items[:index], items[index], items[index + 1 :]
    return [*before, *after] if kind < 2 else [*before[:-1], word, before[-1], *after]


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
        index = WORDS - 1 if task == "last" else pick(rng, range(2, WORDS))
        wrong = mistake(items, number // 2 % 4, index, pick(rng, items[1:-1]))
        yield {
            "instruction": LISTS[task][number % 2],
            "input": " ".join(items),
            "chosen": OPERATIONS[task](items),
            "rejected": OPERATIONS[task](wrong),
            "task": task,
        }
