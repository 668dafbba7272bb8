"""Keeps the page of a run up to date while it is alive, for little time and without ever stopping it."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.errors import Pruned, Stopped, UserError
from qlora.reporting.manifest import plain
from qlora.reporting.rendering import packed_plotly
from qlora.reporting.run_page import RunState, base_metrics, run_page
from qlora.runtime.atomic_files import write_text
from qlora.runtime.disk_space import waiting_for_space
from qlora.runtime.run_folder import RunFolder
from qlora.secrets import hide

log = logging.getLogger(__name__)

PAGE_FRACTION, DISK_FRACTION = 0.02, 0.1
"""At most these fractions of the time are spent on computing the page, and on computing and writing it. Where logs come
faster than that, some are shown with a later one."""
RELOAD_SECONDS = (5.0, 30.0)
"""How often the page loads itself again: as often as it is written, within these bounds."""
OLD_SECONDS = 60.0
"""A page that is older is written without news, for its readers to know that the run is alive."""
UNMEASURED = re.compile(r"_(runtime|per_second)$")
"""What an evaluation logs of itself."""


class LivePage:
    """The page of a run from its begin to its end; in the end the finished run's page replaces it."""

    def __init__(self, folder: RunFolder, *, command: str) -> None:
        self.folder, self.command = folder, command
        self.history: Sequence[Mapping[str, Any]] = []
        self._due = self._written = 0.0
        self._warned = False

    def begin(self, note: str) -> None:
        """Writes the first page."""
        self._write(RunState("running", note, RELOAD_SECONDS[0]))
        self._due = 0.0

    def update(self, history: Sequence[Mapping[str, Any]], note: str, *, measured: bool = False) -> None:
        """Writes what the trainer has logged, and what the run does, unless that would take too much of the time.

        `measured` is for news that took longer than the page.
        """
        self.history, began, computed = history, time.monotonic(), time.thread_time()
        if measured or began >= self._due:
            every = began - self._written if self._written else 0.0
            low, high = RELOAD_SECONDS
            self._write(RunState("running", note, round(min(max(every, low), high), 1)))
            computing, spent = time.thread_time() - computed, time.monotonic() - began
            self._due = began + max(computing / PAGE_FRACTION, spent / DISK_FRACTION)

    def keep_alive(self, history: Sequence[Mapping[str, Any]], note: str) -> None:
        """Writes the page again if it is old."""
        if time.monotonic() - self._written > OLD_SECONDS:
            self.update(history, note)

    def end(self, error: BaseException) -> None:
        """Writes the page of a run that has not finished."""
        stopped = isinstance(error, KeyboardInterrupt | Stopped)
        status = "interrupted" if stopped else "pruned" if isinstance(error, Pruned) else "failed"
        text = hide(" ".join(str(error).split()))
        if stopped:
            text = "the same command in the same folder resumes it"
        elif not isinstance(error, UserError | Pruned):
            text = f"{type(error).__name__}: {text}"
        self._write(RunState(status, text))

    def _write(self, state: RunState) -> None:
        if not self.folder.path.is_dir():  # the run says so itself
            return
        try:
            with waiting_for_space(None):
                packed_plotly()  # half a second, once: before the first step
                if self.history:
                    write_text(self.folder.history, json.dumps(plain(self.history)) + "\n", flush=False)
                result = {"metrics": self._metrics()}
                page = run_page(self.folder, result, command=self.command, state=state)
                write_text(self.folder.report, page, flush=False)
        except Exception as error:  # whatever it is, the training run is worth more
            if not self._warned:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                log.warning("%s is not up to date (%s); the run continues", self.folder.report, text)
            self._warned = True
        self._written = time.monotonic()

    def _metrics(self) -> dict[str, float]:
        """Returns the latest metrics: what the base scored, the last evaluation, and the speed."""
        metrics = {f"base_eval_{name}": value for name, value in base_metrics(self.folder, {}).items()}
        speed = ("train_tokens_per_second", "train_mfu", "train_data_wait", "peak_memory_gb")
        for entry in self.history:
            metrics |= {name: float(value) for name, value in entry.items() if isinstance(value, int | float)
                        and (name in speed or (name.startswith("eval_") and not UNMEASURED.search(name)))}  # fmt: skip
        return metrics
