"""`task=preview`: shows what would be trained, without loading weights."""

from __future__ import annotations

from dataclasses import replace

from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.reporting.manifest import write_json
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.task_result import TaskResult
from qlora.tasks.protocol import TaskJob
from qlora.text import terminal_width

WIDEST = 100
"""Columns of a preview on a wider terminal."""


def needs(config: Config) -> Needs:
    """Returns what a preview needs: all rows, but no weights."""
    return Needs(torch=True, rows=Rows.all, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Writes `preview.html` and `lengths.png`, and prints the first rows."""
    from qlora.data.data_report import data_warnings
    from qlora.reporting.preview import plot_lengths, to_html, to_text
    from qlora.tasks.build_preview import build_preview, preview_metrics

    job.create_folder()
    data = job.session.data
    preview = build_preview(job.config, data, job.session.tokenizer, context=job.session.context)
    page, picture = job.folder.path / "preview.html", job.folder.path / "lengths.png"
    write_text(page, to_html(preview))
    plot_lengths(preview, picture)
    width = min(terminal_width(), WIDEST)
    logged = data_warnings(data.report, job.config.data)  # which stand on the screen already
    unsaid = replace(preview, warnings=[text for text in preview.warnings if text not in logged])
    console.say_colored(to_text(unsaid, ids=job.config.task.ids, color=console.screen().is_terminal, width=width))
    result = TaskResult("preview", preview_metrics(data), {"page": str(page), "lengths": str(picture)})
    write_json(job.folder.result("preview"), result.to_dict())
    console.say()
    console.say_rows([(name, short_path(path)) for name, path in result.paths.items()])
    return result
