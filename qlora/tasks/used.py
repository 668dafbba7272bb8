"""What a task used: the base, the adapter, the rows and the settings, for its result and the start screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config import trained_run
from qlora.config.saved_config import config_to_dict, read_config
from qlora.config.schema import EvaluationName
from qlora.runtime.run_folder import RunFolder

if TYPE_CHECKING:  # which import torch
    from qlora.session import Session
    from qlora.tasks.protocol import TaskJob

MOST = 4
"""The keys that a line of differences names."""
METRIC_KEYS = ("name", "metrics", "win", "generate_samples", "split", "shots", "max_samples", "source_max_len", "tasks")
"""The fields of `evaluation` that decide what is measured."""


def describe_used(job: TaskJob) -> dict[str, Any]:
    """Returns the entry `measured` of a result: which base, adapter and rows were used, with which bits and metrics."""
    session, config = job.session, job.config
    evaluation = config_to_dict(config)["evaluation"]
    return {
        "base": _base(session),
        "adapter": _adapter(session),
        "data": _data(session),
        "bits": config.quantization.bits,
        "evaluation": {key: evaluation[key] for key in METRIC_KEYS},
        "differs": {key: list(pair) for key, pair in _differences(job).items()},
    }


def _base(session: Session) -> dict[str, Any]:
    """Returns name and fingerprint of the base; that of a finetuned model is not needed, so its files are not read."""
    from qlora.models.fingerprint import read_base

    adapter, full = session.trained
    if not session.needs.base and adapter is not None:
        base = read_base(adapter)
        return {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
    if full is not None:
        return {"name": session.config.model.name, "revision": session.config.model.revision, "fingerprint": None}
    return {"name": session.base.name, "revision": session.base.revision, "fingerprint": session.base.fingerprint}


def _adapter(session: Session) -> dict[str, Any] | None:
    from qlora.models.fingerprint import adapter_digest, folder_digest

    adapter, full = session.trained
    if adapter is not None:
        return {"path": str(adapter), "digest": adapter_digest(adapter)}
    return None if full is None else {"path": str(full), "digest": folder_digest(full)}


def _data(session: Session) -> dict[str, Any] | None:
    from qlora.data.ingest.arrow_writer import file_digest

    if session.measures_rows:
        report = session.data.report
        return {"name": report.name, "rows": report.eval_rows, "fingerprint": report.fingerprint}
    path = session.config.evaluation.path
    if session.config.evaluation.name is EvaluationName.rows or path is None or not Path(path).expanduser().is_file():
        return None
    return {"name": path, "rows": None, "fingerprint": file_digest(Path(path).expanduser())[:16]}


def differs_line(job: TaskJob) -> dict[str, str]:
    """Returns the line of the start screen on what differs from the training of the adapter; {}: nothing does."""
    differences = _differences(job)
    if not differences:
        return {}
    texts = [_change(key, now, then) for key, (now, then) in differences.items()]
    more = f", and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return {"differs": f"from the training: {', '.join(texts[:MOST])}{more}"}


def _differences(job: TaskJob) -> Mapping[str, tuple[Any, Any]]:
    folder = trained_run.find_run(job.config.adapter, job.folder.path if job.config.adapter is None else None)
    if folder is None or (folder.resolve() == job.folder.path.resolve() and not job.folder.holds_training):
        return {}
    saved = read_config(RunFolder(folder).config)
    differences = {} if saved is None else trained_run.differences(config_to_dict(job.config), saved)
    if job.session.measures_rows:
        return differences
    return {key: pair for key, pair in differences.items() if key == "data.template" or not key.startswith("data.")}


def _change(key: str, now: Any, then: Any) -> str:
    is_now = f"{key} is not set" if now is None else f"{key}={_brief(now)}"
    return f"{is_now} ({'it was not set' if then is None else f'was {_brief(then)}'})"


def _brief(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
