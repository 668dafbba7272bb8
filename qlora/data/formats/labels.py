"""Labels of preference: which columns say whether an answer is a good one, in which words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qlora.data.formats.cells import Row, is_missing, read_truth
from qlora.errors import DataError
from qlora.text import brief

LABELS = ("label", "kto_tag")
"""Columns that say whether an answer is a good one (KTO)."""
KTO_LABELS = ("kto_tag",)
"""Those that say so in every set; a `label` beside an instruction may be another thing, such as a class."""
GOOD = (
    *("good", "desirable", "desired", "chosen", "accepted", "accept", "preferred", "like", "liked", "up", "upvote"),
    *("upvoted", "thumbs up", "thumb up", "thumbsup", "👍"),
)
BAD = (
    *("bad", "undesirable", "undesired", "rejected", "reject", "dispreferred", "dislike", "disliked", "down"),
    *("downvote", "downvoted", "thumbs down", "thumb down", "thumbsdown", "👎"),
)
"""Words by which people label answers, besides those of a switch; `_` and `-` in them stand for blanks."""
FEELINGS = {"positive": True, "negative": False}
"""Words that label an answer where labels are asked for; elsewhere they may name what a text feels like."""
SKIN_TONES = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")
"""What may follow a thumb."""
LABEL_WORDS = (
    "true, yes, 1, good, desirable, chosen or thumbs up, or false, no, 0, bad, undesirable, rejected or thumbs down"
)


def label_columns(columns: Iterable[str], labels: Sequence[str]) -> list[str]:
    """Returns the columns that hold labels of preference, in whatever capitals."""
    return [column for column in columns if column.lower() in labels]


def is_unlabelled(value: Any) -> bool:
    """Tells whether a label says nothing."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def is_rejected(row: Row, *columns: str) -> bool:
    """Tells whether a label marks the answer of a row as a bad one; raises `DataError` where it is unclear.

    `columns` are those that may hold the label; unset: `LABELS`.
    """
    return any(read_label(row.get(column), column) is False for column in label_columns(row, columns or LABELS))


def read_label(value: Any, column: str, *, asked: bool = False) -> bool | None:
    """Returns whether a label calls an answer a good one; None: it says nothing. Raises `DataError` for other words.

    `asked` says that rows are read for their labels (KTO), so that -1 and the words of `FEELINGS` are labels too.
    """
    if isinstance(value, str):
        spelled = " ".join(re.sub(r"[_-](?=[a-z])", " ", SKIN_TONES.sub("", value).strip().lower()).split())
        if spelled in GOOD or spelled in BAD:
            return spelled in GOOD
        if asked and spelled in FEELINGS:
            return FEELINGS[spelled]
    if asked and label_number(value) == -1:
        return False
    try:
        return read_truth(value)
    except ValueError:
        raise DataError(
            f"column {column} holds {brief(value)}, and the label of an answer is {LABEL_WORDS}"
            f"{'; write it so' if asked else ' (false: not trained); write it so, or leave the column out'} (with a "
            "function of your own: data.format=module:function)"
        ) from None


def label_number(value: Any) -> float | None:
    """Returns the number that a label is, also written as text; None: it is none, or true or false."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
