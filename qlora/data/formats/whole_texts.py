"""Rows of a text and what a head says of it: the name of a class, or numbers; or rows of texts that belong together.

After tokenizing, such a row has the columns of any other: its text's tokens as the tokenizer's own call makes them,
with a label on the last one alone, which is read. `label` (`classes`) or `values` (`values`) holds what is learned,
`partners` (`texts`) the tokens of other texts, of which the first one belongs to it, and `values` then a score or none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.config.registries.objectives import RowKind
from qlora.data.formats.cells import Row, is_missing
from qlora.data.formats.prompts import WholeText
from qlora.data.formats.renderers import Format
from qlora.errors import DataError, did_you_mean
from qlora.text import brief, listed

LABEL_COLUMNS = {
    RowKind.classes: ("label", "labels", "class"),
    RowKind.values: ("score", "scores", "label", "labels", "rating"),
    RowKind.texts: ("score", "similarity", "similarity_score", "label"),
}
"""The columns that hold what is learned, the first there is."""
TEXTS = ("text", "sentence", "content", "document", "review", "comment", "body", "message", "prompt", "query", "input")
"""The columns that hold the text, the first there is."""
TWO_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
             ("question", "sentence"), ("query", "passage"), ("query", "document"), ("prompt", "response"),
             ("question", "answer"), ("instruction", "output"), ("title", "text"))  # fmt: skip
"""Columns of two texts that are read as one, with a line feed between them."""
ANCHORS = ("anchor", "query", "sentence1", "text1", "premise", "question1", "question", "prompt", "title")
PARTNERS = (
    *("positive", "pos", "document", "passage", "sentence2", "text2", "hypothesis", "question2", "answer", "response"),
    "text",
)
"""The columns that hold a text and the one that belongs to it, the first ones there are."""
WRONG = ("negative", "neg")
"""How the names of columns begin that hold texts that do not belong to it."""
WANTS = {RowKind.classes: "a label", RowKind.values: "a number"}


def choose_columns(
    kind: RowKind,
    columns: Sequence[str],
    *,
    key: str,
    label: Sequence[str] | None,
    names: Mapping[str, Sequence[str]],
) -> tuple[Format, str]:
    """Returns the format that reads these columns, and what decided, for people.

    `label` are the columns of `data.label`, `names` the names of the classes of a column that holds their numbers.
    Raises `DataError` where no column holds a text, or what is learned.
    """
    if kind is RowKind.texts:
        return _choose_partners(columns, key=key, label=label)
    learned = _label_columns(kind, columns, key=key, label=label)
    rest = [column for column in columns if column not in learned]
    texts = next((list(pair) for pair in TWO_TEXTS if {*pair} <= {*rest}), [])
    texts = texts or [column for column in TEXTS if column in rest][:1]
    if not texts:
        raise DataError(
            f"{key} has the columns {listed(columns)} and none that is known to hold a text; name it with "
            "data.columns.text=COLUMN"
        )
    render = functools.partial(_render, kind=kind, texts=tuple(texts), learned=tuple(learned), names=dict(names))
    read = " and ".join(learned)
    why = f"columns {' and '.join(texts)} and {read}" if len(texts) > 1 else f"columns {texts[0]} and {read}"
    return Format(render, ((*texts, *learned),)), why


def _choose_partners(columns: Sequence[str], *, key: str, label: Sequence[str] | None) -> tuple[Format, str]:
    """Returns the format of rows of texts that belong together, and what decided."""
    scores = [column for name in LABEL_COLUMNS[RowKind.texts] for column in columns if column.lower() == name][:1]
    scores = _label_columns(RowKind.texts, columns, key=key, label=label) if label is not None else scores
    anchor = next((name for name in ANCHORS if name in columns), None)
    partner = next((name for name in PARTNERS if name in columns and name != anchor), None)
    wrong = [column for column in columns if column.lower().startswith(WRONG) and column not in scores]
    if anchor is None or partner is None:
        raise DataError(
            f"{key} has the columns {listed(columns)}, and head=embed learns from texts that belong together; name "
            "them with data.columns.anchor=COLUMN data.columns.positive=COLUMN, and maybe data.columns.negative=COLUMN"
        )
    if scores and wrong:
        raise DataError(
            f"{key} has both {scores[0]} and {wrong[0]}: a pair of texts has a score, or a third text that does not "
            "belong to it; leave one of the columns out"
        )
    if len(scores) > 1:
        raise DataError(f"data.label={listed(scores)}: a pair of texts has one score; choose one of them")
    texts = (anchor, partner, *wrong)
    render = functools.partial(_render_partners, texts=texts, score=scores[0] if scores else None)
    return Format(render, ((*texts, *scores),)), f"columns {listed([*texts, *scores])}"


def _render_partners(row: Row, *, texts: Sequence[str], score: str | None) -> list[WholeText]:
    cells = [_text(row, column) for column in texts]
    for column, cell in zip(texts, cells, strict=True):
        if not cell.strip():
            raise DataError(f"column {column} holds no text; give it one, or leave the row out")
    values = () if score is None else (_number(row.get(score), score),)
    if values and not -1 <= values[0] <= 1:
        raise DataError(
            f"column {score} holds {values[0]:g}, and the score of a pair is a cosine, from -1 to 1; divide them by "
            "their largest, name another column with data.label=COLUMN, or leave the column out"
        )
    return [WholeText(cells[0], values=values, partners=tuple(cells[1:]))]


def _label_columns(kind: RowKind, columns: Sequence[str], *, key: str, label: Sequence[str] | None) -> list[str]:
    if label is None:
        matches = [column for name in LABEL_COLUMNS[kind] for column in columns if column.lower() == name][:1]
        if not matches:
            raise DataError(
                f"{key} has the columns {listed(columns)}, and none of them is {listed(LABEL_COLUMNS[kind])}: a head "
                f"learns {WANTS[kind]} of each text; name its column with data.label=COLUMN, or leave head out to "
                "train a language model"
            )
        return matches
    for name in label:
        if name not in columns:
            raise DataError(
                f"data.label={name}: {key} has no such column{did_you_mean(name, list(columns))}; it has "
                f"{listed(columns)}"
            )
    if kind is RowKind.classes and len(label) > 1:
        raise DataError(
            f"data.label={listed(label)}: head=classify gives a text one class, from one column; choose one of them, "
            "or head=regress for several numbers"
        )
    return list(label)


def _render(
    row: Row, *, kind: RowKind, texts: Sequence[str], learned: Sequence[str], names: Mapping[str, Sequence[str]]
) -> list[WholeText]:
    parts = [_text(row, column) for column in texts]
    text = "\n".join(parts)
    if not text.strip():
        raise DataError(f"its text ({' and '.join(texts)}) is empty; give it one, or leave the row out")
    if kind is RowKind.classes:
        return [WholeText(text, label=_class(row, learned[0], names.get(learned[0])))]
    values = tuple(value for column in learned for value in _numbers(row, column))
    return [WholeText(text, values=values)]


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"column {column} holds {brief(value)}, and a head reads texts; name another column with "
            "data.columns.text=COLUMN, or write a text of it with data.format=module:function"
        )
    return value


def _class(row: Row, column: str, names: Sequence[str] | None) -> str:
    value = row.get(column)
    if is_missing(value) or (isinstance(value, str) and not value.strip()) or (names is not None and value == -1):
        raise DataError(f"column {column} holds no label; label the row, or leave it out")
    if names is not None and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(names):
            raise DataError(f"column {column} holds {value}, and the set names {len(names)} classes, from 0")
        return names[value]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (int, float)) and value == int(value):
        return str(int(value))
    what = "a list" if isinstance(value, list) else brief(value)
    hint = "choose head=regress for numbers on a scale" if isinstance(value, float) else "give each row one class"
    raise DataError(f"column {column} holds {what}, and a class is a name or a whole number; {hint}")


def _numbers(row: Row, column: str) -> list[float]:
    value = row.get(column)
    cells = value if isinstance(value, list) else [value]
    numbers = [_number(cell, column) for cell in cells]
    if not numbers:
        raise DataError(f"column {column} holds no number; give the row one, or leave it out")
    return numbers


def _number(cell: Any, column: str) -> float:
    if is_missing(cell) or (isinstance(cell, str) and not cell.strip()):
        raise DataError(f"column {column} holds no number; give the row one, or leave it out")
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"column {column} holds {brief(cell)}, and what is learned are numbers; choose head=classify for names, or "
            "another column with data.label=COLUMN"
        )
    return number


def sort_labels(labels: Sequence[str], named: Sequence[str]) -> list[str]:
    """Returns the classes of rows in order: as the set names them, else by number, else by name."""
    distinct = set(labels)
    ordered = [name for name in named if name in distinct]
    rest = sorted(distinct - set(ordered), key=lambda name: (0, int(name), "") if _is_whole(name) else (1, 0, name))
    return [*ordered, *rest]


def _is_whole(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit()
