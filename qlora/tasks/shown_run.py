"""Shows a training run in its page while it is alive, and how it ended if it does not finish."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qlora.reporting.examples import EXAMPLES, write_examples
from qlora.reporting.live_page import LivePage
from qlora.tasks.protocol import TaskJob


@contextlib.contextmanager
def shown_run(job: TaskJob, command: str) -> Iterator[LivePage]:
    """Yields the page of a run whose rows are read; `command` starts the run again.

    Who finishes the run writes its last page.
    """
    from qlora.tasks.build_preview import preview_row

    train = job.session.data.train
    if train is not None:
        rows = train.select(range(min(EXAMPLES, len(train))))
        write_examples(job.folder.examples, [preview_row(row, job.session.tokenizer) for row in rows])
    page = LivePage(job.folder, command=command)
    page.begin("measuring the untuned base" if job.config.evaluation.baseline else "preparing")
    try:
        yield page
    except BaseException as error:
        page.end(error)
        raise
