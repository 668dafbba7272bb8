"""Answers to all held-out rows, in a file that a stopped run continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora.evaluation.answer_log import AnswerLog
from qlora.evaluation.generation import plan_batches, prompt_lengths
from qlora.evaluation.measure import Measurer
from qlora.runtime import console
from qlora.runtime.atomic_files import write_lines
from qlora.text import format_speed


def answer_rows(
    measurer: Measurer,
    load_model: Callable[[], torch.nn.Module],
    *,
    decided_by: dict[str, Any],
    unfinished: Path,
    finished: Path,
) -> float:
    """Writes an answer to every row to `finished`; returns the speed of generation in tokens a second.

    Answers are kept in `unfinished` as they come. Those that are there already are taken over if they were
    `decided_by` the same model, rows and settings. The model is loaded only if some are missing.
    """
    rows = measurer.rows
    answers = AnswerLog(unfinished, decided_by, len(rows))
    batches = dict(enumerate(plan_batches(prompt_lengths(rows), measurer.generation.rows)))
    left = {index: batch for index, batch in batches.items() if not answers.has(batch)}
    if left:
        model = load_model()
        if answers.answered:
            console.say(f"resuming: {answers.answered:,} of {len(rows):,} rows are answered already")
        with console.progress("predicting", len(rows)) as update:
            update(answers.answered)
            for batch in measurer.answer(model, rows, left):
                answers.append(*batch)
                update(answers.answered, note=f"{format_speed(answers.tokens_per_second)} tokens/s")
    write_lines(finished, measurer.records(rows, answers))
    return answers.tokens_per_second
