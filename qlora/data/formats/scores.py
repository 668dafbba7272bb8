"""Rows with several scored answers (UltraFeedback), and the scores beside a chosen and a rejected answer.

A row with a list of answers becomes rows with the columns chosen and rejected, which are read as any others.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora.config.schema import Pairs
from qlora.data.chat.conversations import decode, is_turn
from qlora.data.formats.cells import Row, is_missing, peek, track, with_cells
from qlora.errors import DataError
from qlora.text import brief

NAME = "scored"
LISTS = ("completions", "generations", "responses")
"""The columns that may hold the answers of a row, each a text, a turn, or an object."""
TEXTS = ("response", "completion", "text", "content", "output", "answer", "messages")
"""The keys of an object that may hold its answer."""
SCORES = ("overall_score", "score", "rating", "overall_rating", "avg_rating", "reward")
"""The keys of an object that may hold its score, and columns beside the answers, also in the plural."""
ASPECTS = "annotations"
"""The key of an object that may hold a rating for each of several aspects."""
SIDE_SCORE = re.compile(r"(chosen|rejected)_(?:(?:avg|mean|overall)_)?(?:score|rating|reward)|"
                        r"(?:score|rating|reward)_(chosen|rejected)")  # fmt: skip
"""Columns that hold the scores of both answers of a pair, with `-` for `_` too."""


class Answer(NamedTuple):
    """One of the answers of a row."""

    said: Any
    """A text, a turn or turns."""
    score: float


def best(row: Row) -> Row | None:
    """Returns a row whose chosen answer is that with the best score; None: no answer has one."""
    answers = read_answers(row)
    return with_cells(row, {"chosen": max(answers, key=_score).said}) if answers else None


def as_pairs(row: Row, pairs: Pairs) -> list[tuple[Row, bool]]:
    """Returns rows of chosen and rejected, each with whether their scores are equal.

    They are the first of the best answers against the last of the worst, or every two answers.
    """
    answers = read_answers(row)
    if len(answers) < 2:
        return []
    twos = [(max(answers, key=_score), min(reversed(answers), key=_score))]
    if pairs is Pairs.all:
        twos = [(a, b) if a.score >= b.score else (b, a) for a, b in itertools.combinations(answers, 2)]
    return [(with_cells(row, {"chosen": better.said, "rejected": worse.said}), better.score == worse.score)
            for better, worse in twos]  # fmt: skip


def is_out_of_order(row: Row) -> bool:
    """Tells whether columns beside chosen and rejected hold a score of the chosen answer that is not the larger one."""
    scores: dict[str, float] = {}
    for column in row:
        match = SIDE_SCORE.fullmatch(column.lower().replace("-", "_"))
        if match and (score := _number(row.get(column))) is not None:
            scores[match[1] or match[2]] = score
    return len(scores) == 2 and scores["chosen"] <= scores["rejected"]


def holds_scores(row: Row) -> bool:
    """Tells whether a row holds answers with scores, or none."""
    try:
        read_answers(row)
    except DataError:
        return False
    return True


def read_answers(row: Row) -> list[Answer]:
    """Returns the answers of a row that have a score; raises `DataError` for one that holds none or no scores."""
    column = next((name for name in LISTS if not is_missing(peek(row, name))), LISTS[0])
    cell = decode(row.get(column))
    if is_missing(cell):
        return []
    if isinstance(cell, Mapping) and all(isinstance(part, list) for part in cell.values()):
        cell = [dict(zip(cell, parts, strict=True)) for parts in zip(*cell.values(), strict=True)]
    if not isinstance(cell, list):
        raise DataError(f"data.format={NAME} needs a list of answers in column {column}, but a row holds {brief(cell)}")
    parts = [track(row, part, column) for part in cell]
    scores = _beside(row, len(parts), column)
    if scores is None:
        if not any(isinstance(part, Mapping) and _has_score(part) for part in parts):
            raise DataError(
                f"column {column} holds answers without scores; put these into a column scores "
                f"(data.columns.scores=COLUMN), or beside each answer as {SCORES[1]} or {SCORES[2]}"
            )
        scores = [_inside(part) for part in parts]
    said = [_said(part, column) for part in parts]
    return [Answer(text, score) for text, score in zip(said, scores, strict=True) if score is not None]


def _score(answer: Answer) -> float:
    return answer.score


def _beside(row: Row, count: int, answers: str) -> list[float | None] | None:
    """Returns the scores in a column of their own; None: there is no such column."""
    for column in (name for key in SCORES for name in (f"{key}s", key)):
        cell = decode(peek(row, column))
        if isinstance(cell, list):
            row.get(column)
            if len(cell) != count:
                raise DataError(f"column {column} holds {len(cell)} scores of {count} answers in column {answers}")
            return [_number(score) for score in cell]
    return None


def _has_score(part: Row) -> bool:
    return any(not is_missing(peek(part, key)) for key in (*SCORES, ASPECTS))


def _inside(part: Any) -> float | None:
    """Returns the score that an answer holds itself, or the mean of the ratings of its aspects; None: it has none."""
    if not isinstance(part, Mapping):
        return None
    if key := next((key for key in SCORES if not is_missing(peek(part, key))), None):
        return _number(part[key])
    aspects = part.get(ASPECTS)
    rated = aspects.values() if isinstance(aspects, Mapping) else ()
    ratings = [_number(a.get("Rating", a.get("rating"))) for a in rated if isinstance(a, Mapping)]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _said(part: Any, column: str) -> Any:
    if not isinstance(part, Mapping) or is_turn(part):
        return part
    for key in TEXTS:
        if key in part:
            return part[key]
    raise DataError(
        f"an answer in column {column} holds {brief(dict(part))}, without a text; name it {TEXTS[0]} or {TEXTS[2]}"
    )


def _number(value: Any) -> float | None:
    """Returns a number, also one that is written as text; None: it is none, such as "N/A"."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
