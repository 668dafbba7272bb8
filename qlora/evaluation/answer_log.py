"""Answers on disk while they are generated, so that a prediction that was stopped goes on where it was."""

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
    """Answers to numbered rows in a file, a line each; its first line holds the facts that decided them.

    In memory are only their places in the file.
    """

    def __init__(self, path: Path, decided_by: dict[str, Any], rows: int) -> None:
        """Opens the answers of an earlier start to `rows` rows, or begins anew if other facts decided those.

        `decided_by` is in JSON's types. What a kill left of a line is dropped.
        """
        self.path, self.tokens, self.seconds = path, 0, 0.0
        self._places = np.full(rows, MISSING)
        stored = _first_line(path)
        if stored == decided_by:
            self._find()
            return
        if stored is not None:
            keys = dict.fromkeys([*decided_by, *stored])
            changed = [key for key in keys if stored.get(key) != decided_by.get(key)]
            console.say(f"starting anew: {', '.join(changed)} changed since {path.name} was begun")
        write_text(path, json.dumps(decided_by, ensure_ascii=False) + "\n")

    @property
    def answered(self) -> int:
        """Rows that have an answer."""
        return int((self._places != MISSING).sum())

    @property
    def tokens_per_second(self) -> float:
        """The speed of generation, over all starts."""
        return self.tokens / max(self.seconds, 1e-9)

    def has(self, rows: np.ndarray) -> bool:
        """Returns whether all of these rows have an answer."""
        return bool((self._places[rows] != MISSING).all())

    def append(self, rows: np.ndarray, answers: Sequence[Answer], seconds: float) -> None:
        """Writes the answers of a batch, which took `seconds`; they are on their way to the disk on return."""
        with self.path.open("ab") as file:
            for row, answer in zip(rows.tolist(), answers, strict=True):
                record = {"row": row, **asdict(answer), "seconds": seconds / len(answers)}
                self._note(record, file.tell())
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def __iter__(self) -> Iterator[Answer]:
        """Yields the answers in the order of the rows; every row must have one."""
        with self.path.open("rb") as file:
            for place in self._places.tolist():
                file.seek(place)
                record = json.loads(file.readline())
                yield Answer(record["text"], record["tokens"], record["finish"])

    def _find(self) -> None:
        with self.path.open("rb") as file:
            place = len(file.readline())
            for line in file:
                record = _whole(line)
                if record is None or not self._is_answer(record):
                    break
                self._note(record, place)
                place += len(line)
        os.truncate(self.path, place)

    def _is_answer(self, record: dict[str, Any]) -> bool:
        """Returns whether a line is the answer to one of the rows, as `append` writes them."""
        row, tokens, seconds = (record.get(name) for name in ("row", "tokens", "seconds"))
        is_row = isinstance(row, int) and 0 <= row < len(self._places)
        is_text = all(isinstance(record.get(name), str) for name in ("text", "finish"))
        return is_row and is_text and isinstance(tokens, int) and isinstance(seconds, int | float)

    def _note(self, record: dict[str, Any], place: int) -> None:
        self._places[record["row"]] = place
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
        return _whole(file.readline())


def _whole(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line, or None if the line was not written to its end."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
