"""Which of two models answers better, by a function of the user's (`evaluation.win`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from qlora.config.schema.evaluation import WIN_METRICS
from qlora.config.user_code import import_function
from qlora.errors import DataError
from qlora.evaluation.measure import Measurement
from qlora.evaluation.statistics import Score
from qlora.text import brief

Judge = Callable[[str, str, str], str]
"""Takes a prompt, an answer, and the answer of the model before; returns a key of `WORTH`."""
WORTH = {"win": 1.0, "tie": 0.5, "lose": 0.0}


def find_judge(name: str | None) -> Judge | None:
    """Returns the function of `evaluation.win`; raises `ConfigError` where there is none of this name."""
    return None if name is None else import_function(name, "evaluation.win")


def count_wins(judge: Judge, records: Sequence[dict[str, Any]], previous: Sequence[dict[str, Any]]) -> Measurement:
    """Returns the share of answers that win, a tie counting half, and the numbers of wins, ties and losses.

    Both are records of answers to the same rows, as `Measurer.predict` returns them.
    """
    assert len(records) == len(previous), "both models answer the same rows"
    results = [
        _read(judge(record["input"], record["prediction"], other["prediction"]), number)
        for number, (record, other) in enumerate(zip(records, previous, strict=True), 1)
    ]
    counts, score = Counter(results), Score([WORTH[result] for result in results])
    numbers = (float(counts[result]) for result in WORTH)
    return Measurement(dict(zip(WIN_METRICS, (score.estimate().value, *numbers), strict=True)), {WIN_METRICS[0]: score})


def _read(result: object, number: int) -> str:
    if isinstance(result, str) and result in WORTH:
        return result
    raise DataError(f"evaluation.win must return win, tie or lose, got {brief(result)} for held-out row {number}")
