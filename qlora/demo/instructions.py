"""The embedded instructions, as rows in the Alpaca layout, and the embedded pairs of answers.

Evaluation rows ask about people, words, numbers and lists that no training row mentions.
"""

import json
from pathlib import Path
from typing import Final

Row = dict[str, str]

DATA_FOLDER: Final = Path(__file__).parent / "data"


def train_rows() -> list[Row]:
    """Returns the 2,464 training rows."""
    return _read(DATA_FOLDER / "train.jsonl")


def eval_rows() -> list[Row]:
    """Returns the 300 evaluation rows."""
    return _read(DATA_FOLDER / "eval.jsonl")


def preference_rows() -> list[Row]:
    """Returns the 384 training pairs: answers about lists of six words, of which the rejected one is wrong."""
    return _read(DATA_FOLDER / "preferences.jsonl")


def preference_eval_rows() -> list[Row]:
    """Returns the 96 pairs to measure on, about other lists."""
    return _read(DATA_FOLDER / "preferences_eval.jsonl")


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
