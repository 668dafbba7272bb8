"""Answers on disk while they are generated, so that a stopped prediction resumes where it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from qlora.evaluation.generation import Answer, prompt_lengths
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text

MISSING = -1


class AnswerLog:
    """Answers to rows in a file, one a line; the first line holds the settings that determine the answers.

    Only their offsets in the file are kept in memory.
    """

    def __init__(self, path: Path, decided_by: dict[str, Any], rows: int) -> None:
        """Opens the answers of an earlier start to `rows` rows, or starts again if other settings determined them.

        `decided_by` holds JSON's types. A line that a kill cut off is dropped.
        """
        self.path, self.tokens, self.seconds = path, 0, 0.0
        self._offsets = np.full(rows, MISSING)
        saved = _first_line(path)
        if saved == decided_by:
            self._read_offsets()
            return
        if saved is not None:
            keys = dict.fromkeys([*decided_by, *saved])
            changed = [key for key in keys if saved.get(key) != decided_by.get(key)]
            console.say(f"starting again: {', '.join(changed)} changed since {path.name} was written")
        write_text(path, json.dumps(decided_by, ensure_ascii=False) + "\n")

    @property
    def answered(self) -> int:
        """Rows that have an answer."""
        return int((self._offsets != MISSING).sum())

    @property
    def tokens_per_second(self) -> float:
        """The speed of generation, over all starts."""
        return self.tokens / max(self.seconds, 1e-9)

    def has(self, rows: np.ndarray) -> bool:
        """Returns whether all of these rows have an answer."""
        return bool((self._offsets[rows] != MISSING).all())

    def append(self, rows: np.ndarray, answers: Sequence[Answer], seconds: float) -> None:
        """Writes the answers of a batch, which took `seconds`; on return the system has them."""
        with self.path.open("ab") as file:
            for row, answer in zip(rows.tolist(), answers, strict=True):
                record = {"row": row, **asdict(answer), "seconds": seconds / len(answers)}
                self._record(record, file.tell())
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def __iter__(self) -> Iterator[Answer]:
        """Yields the answers in the order of the rows; every row must have one."""
        with self.path.open("rb") as file:
            for offset in self._offsets.tolist():
                file.seek(offset)
                record = json.loads(file.readline())
                yield Answer(record["text"], record["tokens"], record["finish"])

    def _read_offsets(self) -> None:
        with self.path.open("rb") as file:
            offset = len(file.readline())
            for line in file:
                record = _parse_line(line)
                if record is None or not self._is_answer(record):
                    break
                self._record(record, offset)
                offset += len(line)
        os.truncate(self.path, offset)

    def _is_answer(self, record: dict[str, Any]) -> bool:
        """Returns whether a line is the answer to one of the rows, as `append` writes them."""
        row, tokens, seconds = (record.get(name) for name in ("row", "tokens", "seconds"))
        is_row = isinstance(row, int) and 0 <= row < len(self._offsets)
        is_text = all(isinstance(record.get(name), str) for name in ("text", "finish"))
        return is_row and is_text and isinstance(tokens, int) and isinstance(seconds, int | float)

    def _record(self, record: dict[str, Any], offset: int) -> None:
        self._offsets[record["row"]] = offset
        self.tokens += record["tokens"]
        self.seconds += record["seconds"]


def rows_digest(rows: Dataset) -> str:
    """Returns the SHA-256 of what is asked and expected: tokens, prompts and references, in order."""
    digest = hashlib.sha256(prompt_lengths(rows).astype("<i8").tobytes())
    names = [name for name in ("digest", "prompt", "reference", "task") if name in rows.column_names]
    for part in rows.select_columns(names).iter(batch_size=1000):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def _first_line(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return _parse_line(file.readline())


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line, or None if the line was not written to its end."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
