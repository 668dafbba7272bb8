"""What a task declares it needs, so that the command line and the session need no code for single tasks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rows(Enum):
    """The rows of the data set that a task reads."""

    none = "none"
    held_out = "held_out"
    all = "all"
    """The rows to train on, and the held-out rows."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a task needs under a config; the defaults are those of a task that reads and writes text files."""

    torch: bool = False
    """torch and the libraries on top of it are imported before the task begins."""
    base: bool = False
    """The base model is used, so an adapter must have been trained on it."""
    rows: Rows = Rows.none
    questions: bool = False
    """Held-out rows of `data.eval_path` may hold no answer; the model answers them."""
    answers: int | None = 0
    """How many held-out rows are answered at most; None: all of them."""
    saved_template: bool = False
    """Conversations are written with the chat template that was saved with the adapter, where there is one."""
    several_processes: bool = False
    """Processes that were launched together may run the task; every other task is refused in them."""
    tracker: bool = False
    """Metrics go to the tracker of `tracking=`."""
    deterministic: bool = False
    """Deterministic algorithms may be switched on while the task runs, so cuBLAS needs its workspace from the start."""
    folder: bool = True
    """The task writes a folder with a log. Without one, it is a single run that leaves no trace."""
    caches: bool = False
    """Caches are read or written, so the process needs a home folder."""
    whole_sweep: bool = False
    """The task reads all values of a sweep itself; every other task is run once for each combination."""
