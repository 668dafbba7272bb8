"""What tasks that measure a model have in common: the untuned base beside it, the result, the summary on the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.reporting.start_lines import evaluation_lines
from qlora.reporting.summary import next_commands, print_summary
from qlora.runtime import console
from qlora.runtime.atomic_files import read_lines, write_lines
from qlora.runtime.task_result import TaskResult
from qlora.runtime.trained import TAKE_BASE
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import differs_line

if TYPE_CHECKING:  # which import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora.evaluation.measure import Measurement
    from qlora.session import Session


def load_model(job: TaskJob) -> PreTrainedModel | PeftModel:
    """Loads what `adapter` names, and prints the start screen of a task that measures it or lets it answer."""
    session = job.session
    model = session.load_trained()
    report = session.data.report if session.reads_rows else None
    lines = session.describe(model).lines | evaluation_lines(job.config, report) | differs_line(job)
    console.start_screen(list(lines.items()))
    return model


def measure_untuned(
    session: Session, model: PreTrainedModel | PeftModel, *, keep_adapter: bool = False, label: str = "the untuned base"
) -> Measurement:
    """Measures the base of a model with its adapter switched off, unless that is to stay on."""
    from qlora.adapters import adapter_off

    rows = f" on {len(session.measurer.rows):,} held-out rows" if session.measures_rows else ""
    console.say(f"measuring {label}{rows}")
    session.previous_answers = []
    with contextlib.nullcontext() if keep_adapter else adapter_off(model):
        measured = session.measure_base(model)
    session.previous_answers = measured.predictions
    return measured


def prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values under names that begin with `prefix`."""
    return {f"{prefix}{name}": value for name, value in values.items()}


def build_result(
    job: TaskJob,
    metrics: Mapping[str, float],
    measured: Measurement,
    base: Measurement | None = None,
    *,
    predictions: Path | None = None,
    more: Mapping[str, Any] | None = None,
) -> TaskResult:
    """Writes answers (to `predictions.jsonl` if not to another file) and questions, and returns the result."""
    folder = job.folder
    predictions = predictions or folder.predictions
    if measured.predictions:
        write_lines(predictions, measured.predictions)
    records = folder.path / f"{job.config.evaluation.name.value}.jsonl"
    if measured.records:
        write_lines(records, measured.records)
    files = {
        "result": folder.result(job.config.task.name.value),
        "adapter": folder.adapter,
        "model": folder.model,
        "predictions": predictions,
        "questions": records,
        "loss": folder.path / "loss.png",
        "profile": folder.trace,
        "config": folder.config,
        "card": folder.path / "README.md",
    }
    objective = job.config.objective
    certainty = {
        "intervals": (prefixed("base_eval_", base.intervals()) if base is not None else {})
        | prefixed("eval_", measured.intervals()),
        "gains": {name: gain._asdict() for name, gain in measured.gains(base).items()} if base is not None else {},
    }
    return TaskResult(
        job.config.task.name.value,
        metrics,
        {name: str(path) for name, path in files.items() if name == "result" or path.exists()},  # written last
        metrics.get(objective) if objective else None,
        certainty,
        more or {},
    )


def print_measured(
    title: str,
    job: TaskJob,
    result: TaskResult,
    predictions: list[dict[str, Any]],
    *,
    left_out: Sequence[str] = (),
) -> None:
    """Prints a result and some answers; `left_out` overrides are not repeated in the commands that use the result."""
    is_base = job.config.task.name in TAKE_BASE and job.session.trained == (None, None)
    print_summary(
        title,
        result.to_dict(),
        predictions,
        config=job.config,
        folder=job.folder.path,
        next_steps=next_commands(
            job.config.task.name.value,
            "none" if is_base else job.config.adapter,
            job.folder.path,
            job.overrides,
            options=job.options,
            left_out=left_out,
            writes=not job.config.loss.has_head,
        ),
    )


def first_predictions(job: TaskJob) -> list[dict[str, Any]]:
    """Returns the answers in the folder that the summary shows."""
    return read_lines(job.folder.predictions, job.config.evaluation.show_predictions)
