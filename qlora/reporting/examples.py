"""Some rows of the training set as the model sees them, in the run's folder: which text carries loss."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.runtime.atomic_files import read_lines, write_lines

if TYPE_CHECKING:  # which imports matplotlib, and readers need none
    from qlora.reporting.preview.content import PreviewRow

EXAMPLES = 4
"""The rows that are kept."""
ROOM = 6_000
"""The characters of a row that are kept."""


def write_examples(path: Path, rows: Iterable[PreviewRow]) -> None:
    """Writes rows as JSON lines: the row's number, how it was changed, its tokens in words, and its parts."""
    write_lines(path, [_record(row) for row in rows])


def read_examples(path: Path) -> list[dict[str, Any]]:
    """Returns what `write_examples` wrote; raises `DamagedFile`."""
    rows = read_lines(path, EXAMPLES)
    return [
        {
            "row": row.get("row"),
            "tokens": str(row.get("tokens", "")),
            "notes": [str(note) for note in row.get("notes") or []],
            "parts": [part for part in row.get("parts") or [] if isinstance(part, dict) and "text" in part],
        }
        for row in rows
    ]


def _record(row: PreviewRow) -> dict[str, Any]:
    from qlora.reporting.preview.content import Gap, describe_tokens, shorten_row

    parts = shorten_row(row.tokens, ROOM)
    return {
        "row": row.number,
        "tokens": describe_tokens(row.tokens),
        "notes": row.notes,
        "parts": [
            {"text": "".join(f" {part} " if isinstance(part, Gap) else part.text for part in group), "trained": trained}
            for trained, group in groupby(parts, key=lambda part: part.trained)
        ],
    }
