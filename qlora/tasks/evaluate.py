"""`task=evaluate`: measures what `adapter` names, and the untuned base beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.config.paths import short_path
from qlora.config.schema import Config, EvaluationName
from qlora.reporting.manifest import write_json
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import build_result, load_model, measure_untuned, prefixed, print_measured
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

if TYPE_CHECKING:  # which import torch
    from peft import PeftModel

    from qlora.evaluation.measure import Measurement
    from qlora.session import Session


def needs(config: Config) -> Needs:
    """Returns what evaluation needs; `evaluation=mmlu` and `evaluation=lm-eval` read no rows."""
    evaluation = config.evaluation
    return Needs(
        torch=True,
        base=True,
        rows=Rows.held_out if evaluation.name is EvaluationName.rows else Rows.none,
        answers=evaluation.scored_answers,
        tracker=True,
        caches=True,
    )


def run(job: TaskJob) -> TaskResult:
    """Measures; the result goes to `evaluate.json`."""
    from peft import PeftModel

    from qlora.evaluation.measure import Measurement

    session = job.session
    _ = session.trained  # before the rows: an adapter of another base fails at once
    _ = session.suite  # before the model: a broken file of questions fails at once, and so do rows
    if session.reads_rows:
        _ = session.measurer
    job.create_folder()
    model = load_model(job)
    with session.tracking() as (tracker, metrics):
        base = Measurement()
        if isinstance(model, PeftModel) and job.config.evaluation.baseline and job.config.task.evaluate:
            base = _measure_base(session, model)
        metrics |= prefixed("base_eval_", base.metrics)
        measured = session.measure(model) if isinstance(model, PeftModel) else session.measure_base(model)
        metrics |= prefixed("eval_", measured.metrics)
        tracker.log(prefixed("eval/", measured.metrics), step=0)
        tracker.log_predictions(measured.predictions[: job.config.evaluation.show_predictions], step=0)
        result = build_result(job, metrics, measured, base, predictions=job.folder.path / "evaluate.jsonl",
                              more={"measured": describe_used(job)})  # fmt: skip
        write_json(job.folder.result("evaluate"), result.to_dict())
    print_measured("evaluated", job, result, measured.predictions)
    return result


def _measure_base(session: Session, model: PeftModel) -> Measurement:
    """Measures what training has measured before its first step: the base, or the start of preferences."""
    from qlora import adapters

    start = session.start if session.config.loss.measured else None
    if start is None:
        return measure_untuned(session, model, label=session.baseline)
    with adapters.reference_of_trained(model, start)():
        return measure_untuned(session, model, keep_adapter=True, label=f"the start ({short_path(start)})")
