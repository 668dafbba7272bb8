"""What `task=predict` does with a reward model: it writes the rewards of both answers of every held-out pair."""

from __future__ import annotations

from typing import Any

from qlora.reporting.manifest import write_json
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import build_result, load_model, prefixed, print_measured
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import describe_used


def score_rows(job: TaskJob) -> TaskResult:
    """Writes a record of each pair to `predictions.jsonl`, in the order of the rows, with both rewards."""
    from qlora.evaluation.measure import Measurement, evaluation_mode
    from qlora.upstream.transformers import decode

    session = job.session
    _ = session.trained  # before the folder: a task without an adapter leaves none
    measurer = session.measurer
    job.create_folder()
    model = load_model(job)
    assert measurer.compare is not None, "rows of a reward model are pairs"
    with evaluation_mode(model), measurer.autocast():
        measured = measurer.compare(model)
    rewards = [measured.scores[f"{side}_reward"].values for side in ("chosen", "rejected")]
    records: list[dict[str, Any]] = []
    for row, chosen, rejected in zip(measurer.rows, *rewards, strict=True):
        start = row["answer_start"]
        texts = [decode(session.tokenizer, row[name][start:]) for name in ("input_ids", "rejected_ids")]
        records.append({"input": row["prompt"], "chosen": texts[0], "rejected": texts[1],
                        "chosen_reward": chosen, "rejected_reward": rejected})  # fmt: skip
    values = prefixed("eval_", measured.metrics)
    result = build_result(
        job,
        values,
        Measurement(measured.metrics, measured.scores, records),
        more={"measured": describe_used(job)},
    )
    write_json(job.folder.result("predict"), result.to_dict())
    print_measured("predicted", job, result, [])
    return result
