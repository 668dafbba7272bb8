"""`task=predict`: writes an answer to every held-out row, or its rewards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qlora.config.paths import short_path
from qlora.config.saved_config import config_to_dict, flatten
from qlora.config.schema import Config
from qlora.reporting.manifest import code_digest, versions, write_json
from qlora.runtime import console
from qlora.runtime.atomic_files import iter_lines
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.saved_run import set_damage_aside
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import build_result, first_predictions, load_model, prefixed, print_measured
from qlora.tasks.protocol import TaskJob
from qlora.tasks.score_rows import score_rows
from qlora.tasks.used import describe_used
from qlora.text import plural


def needs(config: Config) -> Needs:
    """Returns what prediction needs; a reward model answers nothing, and reads both sides of pairs."""
    return Needs(
        torch=True,
        base=True,
        rows=Rows.held_out,
        questions=not config.loss.has_head,
        answers=0 if config.loss.has_head else None,
        caches=True,
    )


def run(job: TaskJob) -> TaskResult:
    """Writes answers to `predictions.jsonl`, and continues where a start was stopped.

    Answers that are there already, decided by the same model, rows and settings, are not generated again.
    """
    from qlora.data.ingest.arrow_writer import file_digest
    from qlora.evaluation.answering import answer_rows

    if job.config.loss.has_head:
        return score_rows(job)
    folder, path = job.folder, job.folder.predictions
    _ = job.session.trained  # before the folder: a task without an adapter leaves none
    job.create_folder()
    set_damage_aside(folder.path, folder.result("predict").name)
    decided_by, metrics = _decided_by(job), job.config.evaluation.metrics
    saved = folder.stored_result("predict") or {}
    known = saved.get("answers", {})
    if known.get("decided_by") == decided_by and path.is_file() and known.get("sha256") == file_digest(path):
        if known.get("metrics") == metrics:
            console.say(f"{short_path(folder.path)} holds these answers already; this is the saved result")
            result = TaskResult.from_dict(saved)
            print_measured("predicted", job, result, first_predictions(job))
            return result
        speed = saved["metrics"].get("predict_tokens_per_second", math.nan)
    else:
        speed = answer_rows(
            job.session.measurer,
            lambda: load_model(job),
            decided_by=decided_by,
            unfinished=folder.unfinished_predictions,
            finished=path,
        )
    measured = job.session.measurer.score(iter_lines(path))
    unanswered = job.session.measurer.unanswered
    if unanswered:
        rows = len(job.session.measurer.rows)
        others = f"the metrics are those of the other {rows - unanswered:,}"
        rest = "nothing is measured" if unanswered == rows else others
        verb = "holds" if unanswered == 1 else "hold"
        console.say(f"{unanswered:,} of {plural(rows, 'row')} {verb} no answer to compare with: {rest}")
    values = prefixed("eval_", measured.metrics) | {"predict_tokens_per_second": speed}
    answers = {"metrics": metrics, "sha256": file_digest(path), "decided_by": decided_by}
    more = {"answers": answers, "unanswered": unanswered, "measured": describe_used(job)}
    result = build_result(job, values, measured, more=more)
    write_json(folder.result("predict"), result.to_dict())
    folder.unfinished_predictions.unlink(missing_ok=True)
    print_measured("predicted", job, result, first_predictions(job))
    return result


def _decided_by(job: TaskJob) -> dict[str, Any]:
    """Returns everything that decides the answers, by name, in JSON's types."""
    from qlora.evaluation.answer_log import rows_digest
    from qlora.models.fingerprint import adapter_digest, folder_digest

    session, config = job.session, config_to_dict(job.config)
    placement, (adapter, full) = session.placement, session.trained
    settings = {
        "model": {key: value for key, value in config["model"].items() if key not in ("cache_dir", "license")},
        "quantization": config["quantization"],
        "generation": config["generation"],
        "seed": config["seed"],
        "device": f"{placement.device.type}, {placement.param_dtype}, {placement.compute_dtype}",
        "base": None if session.has_random_weights else _base_digest(job),
        "adapter": adapter and adapter_digest(adapter),
        "finetuned model": full and folder_digest(full),
        "rows": rows_digest(session.measurer.rows),
        "end token": session.end_id,
        "version": versions(),
        "code": code_digest(),
    }
    return dict(flatten(settings))


def _base_digest(job: TaskJob) -> str | None:
    from qlora.models.fingerprint import folder_digest
    from qlora.models.model_files import is_local, locate
    from qlora.upstream.transformers_models import commit_hash

    location = locate(job.config.model.name)
    return folder_digest(Path(location)) if is_local(location) else commit_hash(job.session.model_config)
