"""Rows of a text and what a head says of it: the name of a class, or numbers.

After tokenizing, such a row has the columns of any other: its text's tokens as the tokenizer's own call makes them,
with a label on the last one alone, which is read. `label` (`classes`) or `values` (`values`) holds what is learned.
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
}
"""The columns that hold what is learned, the first there is."""
TEXTS = ("text", "sentence", "content", "document", "review", "comment", "body", "message", "prompt", "query", "input")
"""The columns that hold the text, the first there is."""
TWO_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
             ("question", "sentence"), ("query", "passage"), ("query", "document"), ("prompt", "response"),
             ("question", "answer"), ("instruction", "output"), ("title", "text"))  # fmt: skip
"""Columns of two texts that are read as one, with a line feed between them."""
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


def _label_columns(kind: RowKind, columns: Sequence[str], *, key: str, label: Sequence[str] | None) -> list[str]:
    if label is None:
        found = [column for name in LABEL_COLUMNS[kind] for column in columns if column.lower() == name][:1]
        if not found:
            raise DataError(
                f"{key} has the columns {listed(columns)}, and none of them is {listed(LABEL_COLUMNS[kind])}: a head "
                f"learns {WANTS[kind]} of each text; name its column with data.label=COLUMN, or leave head out to "
                "train a language model"
            )
        return found
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
            f"column {column} holds {brief(cell)}, and head=regress learns numbers; choose head=classify for names, or "
            "another column with data.label=COLUMN"
        )
    return number


def sort_labels(found: Sequence[str], named: Sequence[str]) -> list[str]:
    """Returns the classes of rows in order: as the set names them, else by number, else by name."""
    distinct = set(found)
    ordered = [name for name in named if name in distinct]
    rest = sorted(distinct - set(ordered), key=lambda name: (0, int(name), "") if _is_whole(name) else (1, 0, name))
    return [*ordered, *rest]


def _is_whole(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit()
