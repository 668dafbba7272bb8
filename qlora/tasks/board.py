"""`task=board`: shows all runs and sweeps of `outputs/` in a browser on this machine, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from qlora.board.server import Board
from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.runtime import console
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.tasks.protocol import TaskJob
from qlora.text import plural

FOLDER = Path("outputs")


def needs(config: Config) -> Needs:
    """Returns what a board needs: it reads files of runs only, and writes none."""
    return Needs(folder=False)


def run(job: TaskJob) -> TaskResult:
    """Serves the board until Ctrl-C; raises `ResourceError` where its port is in use."""
    with Board(FOLDER, job.config.task.port) as board:
        runs = len(board.runs.read()["runs"])
        console.say(f"board of {short_path(board.folder.root)}: {plural(runs, 'run') if runs else 'no runs yet'}")
        console.say(f"open {board.url} in a browser on this machine; Ctrl-C stops it")
        try:
            board.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.say()
    return TaskResult("board", {"board_runs": runs}, {"board": board.url})
