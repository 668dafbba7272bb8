"""Instruction rows in the Alpaca layout, drawn from the world that the corpus describes.

Evaluation rows share the templates with the training rows; the people, words, numbers and lists in
them are held out.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from demo_world import templates
from demo_world.operations import OPERATIONS, draw_words
from demo_world.world import ANTONYMS, CATEGORIES, CYCLES, LARGEST_NUMBER, PEOPLE

Row = dict[str, str]


class Question(NamedTuple):
    """What is asked, apart from the wording."""

    wordings: tuple[str, ...]
    slots: dict[str, str]
    answer: str


PREAMBLE_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
PREAMBLE: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

HELD_OUT_PEOPLE: Final = PEOPLE[2::3]
HELD_OUT_PAIRS: Final = ANTONYMS[2::4]
HELD_OUT_WORDS: Final = tuple(word for items in CATEGORIES.values() for word in items[0::3])

TRAIN_COUNTS: Final = {
    "fact": 800,
    **dict.fromkeys(templates.LISTS, 70),
    "antonym": 132,
    "category": 96,
    "next": 28,
    "previous": 28,
    "add": 340,
    "subtract": 340,
}
EVAL_COUNTS: Final = {
    "fact": 100,
    **dict.fromkeys(templates.LISTS, 10),
    "antonym": 22,
    "category": 26,
    "next": 8,
    "previous": 8,
    "add": 18,
    "subtract": 18,
}


def train_rows() -> list[Row]:
    """Returns the training rows, the same at every call."""
    return _rows(TRAIN_COUNTS, Random(7), held_out=False, taken=set())


def eval_rows() -> list[Row]:
    """Returns 300 evaluation rows about what no training row mentions."""
    taken = {row["input"] for row in train_rows() if row["task"] in templates.LISTS}
    return _rows(EVAL_COUNTS, Random(8), held_out=True, taken=taken)


def prompt(row: Row) -> str:
    """Returns the Alpaca prompt of a row, up to where the response starts."""
    if row["input"]:
        body = f"{row['instruction']}\n\n### Input:\n{row['input']}"
        return f"{PREAMBLE_WITH_INPUT}\n\n### Instruction:\n{body}\n\n### Response: "
    return f"{PREAMBLE}\n\n### Instruction:\n{row['instruction']}\n\n### Response: "


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Writes rows as one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rows(counts: dict[str, int], rng: Random, *, held_out: bool, taken: set[str]) -> list[Row]:
    """Draws `counts` rows a task in random order; no list among them is in `taken`."""
    rows: list[Row] = []
    for task, count in counts.items():
        if task in templates.LISTS:
            rows += _list_rows(task, count, rng, taken)
        else:
            rows += _finite_rows(task, count, rng, list(QUESTIONS[task](held_out)))
    rng.shuffle(rows)
    return rows


def _list_rows(task: str, count: int, rng: Random, taken: set[str]) -> Iterator[Row]:
    for index in range(count):
        while (text := " ".join(items := draw_words(rng, task))) in taken:
            pass
        taken.add(text)
        wording = templates.LISTS[task][index % len(templates.LISTS[task])]
        yield _row(task, f"{wording}|{{x}}", {"x": text}, OPERATIONS[task](items))


def _finite_rows(task: str, count: int, rng: Random, questions: list[Question]) -> list[Row]:
    """Asks every question in one wording before any is asked in a second one."""
    rng.shuffle(questions)
    wordings = [rng.sample(question.wordings, len(question.wordings)) for question in questions]
    rows = [
        _row(task, wording, question.slots, question.answer)
        for turn in zip(*wordings, strict=True)
        for question, wording in zip(questions, turn, strict=True)
    ]
    assert len(rows) >= count, f"{task} has {len(rows)} different rows, {count} are asked for"
    return rows[:count]


def _row(task: str, wording: str, slots: dict[str, str], answer: str) -> Row:
    instruction, _, text = wording.format_map(slots).partition("|")
    return {"instruction": instruction, "input": text, "output": answer, "task": task}


def _person_facts(held_out: bool) -> Iterator[Question]:
    for person in PEOPLE:
        if (person in HELD_OUT_PEOPLE) == held_out:
            for attribute, value in person.values.items():
                yield Question(templates.FACTS[attribute], {"n": person.name}, value)


def _antonyms(held_out: bool) -> Iterator[Question]:
    for pair in ANTONYMS:
        if (pair in HELD_OUT_PAIRS) == held_out:
            for word, answer in (pair, pair[::-1]):
                yield Question(templates.ANTONYM, {"w": word}, answer)


def _categories(held_out: bool) -> Iterator[Question]:
    for category, items in CATEGORIES.items():
        for word in items:
            if (word in HELD_OUT_WORDS) == held_out:
                yield Question(templates.CATEGORY, {"w": word}, category)


def _neighbours(wordings: tuple[str, ...], step: int, held_out: bool) -> Iterator[Question]:
    """Asks for the next or previous name; one of four names is held out."""
    for cycle, names in CYCLES.items():
        for index, name in enumerate(names):
            if ((index + step) % 4 == 1) == held_out:
                answer = names[(index + step) % len(names)]
                yield Question(wordings, {"c": cycle, "w": name}, answer)


def _sums(held_out: bool) -> Iterator[tuple[int, int]]:
    """Yields pairs of numbers; one of four sums is held out, whatever the order of its parts."""
    for left in range(LARGEST_NUMBER + 1):
        for right in range(LARGEST_NUMBER + 1 - left):
            if ((max(left, right) + 2 * min(left, right)) % 4 == 2) == held_out:
                yield left, right


def _additions(held_out: bool) -> Iterator[Question]:
    for left, right in _sums(held_out):
        yield Question(templates.ADD, {"a": str(left), "b": str(right)}, str(left + right))


def _subtractions(held_out: bool) -> Iterator[Question]:
    for left, right in _sums(held_out):
        yield Question(templates.SUBTRACT, {"a": str(left + right), "b": str(left)}, str(right))


QUESTIONS: Final[dict[str, Callable[[bool], Iterator[Question]]]] = {
    "fact": _person_facts,
    "antonym": _antonyms,
    "category": _categories,
    "next": lambda held_out: _neighbours(templates.NEXT, 1, held_out),
    "previous": lambda held_out: _neighbours(templates.PREVIOUS, -1, held_out),
    "add": _additions,
    "subtract": _subtractions,
}
