"""What `task=predict` does with a head: it writes what that says of held-out texts, or the rewards of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora.reporting.manifest import write_json
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import build_result, load_model, prefixed, print_measured
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used

if TYPE_CHECKING:  # which imports torch
    from qlora.evaluation.measure import Measurement


def score_rows(job: TaskJob) -> TaskResult:
    """Writes a record of each row to `predictions.jsonl`, in their order: both rewards of a pair, or what is said."""
    from qlora.evaluation.measure import Measurement, evaluation_mode

    session = job.session
    _ = session.trained  # before the folder: a task without an adapter leaves none
    measurer = session.measurer
    job.create_folder()
    model = load_model(job)
    assert measurer.compare is not None, "rows of a head are compared with what is true of them"
    with evaluation_mode(model), measurer.autocast():
        measured = measurer.compare(model)
    records = _rewards(job, measured) if job.config.loss.is_preference else measured.predictions
    values = prefixed("eval_", measured.metrics)
    result = build_result(
        job,
        values,
        Measurement(measured.metrics, measured.scores, records),
        more={"measured": describe_used(job)},
    )
    write_json(job.folder.result("predict"), result.to_dict())
    print_measured("predicted", job, result, [] if job.config.loss.is_preference else records)
    return result


def _rewards(job: TaskJob, measured: Measurement) -> list[dict[str, Any]]:
    from qlora.upstream.transformers import decode

    session = job.session
    rewards = [measured.scores[f"{side}_reward"].values for side in ("chosen", "rejected")]
    records: list[dict[str, Any]] = []
    for row, chosen, rejected in zip(session.measurer.rows, *rewards, strict=True):
        start = row["answer_start"]
        texts = [decode(session.tokenizer, row[name][start:]) for name in ("input_ids", "rejected_ids")]
        records.append({"input": row["prompt"], "chosen": texts[0], "rejected": texts[1],
                        "chosen_reward": chosen, "rejected_reward": rejected})  # fmt: skip
    return records
