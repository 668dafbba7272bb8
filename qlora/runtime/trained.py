"""What `adapter=` names: an adapter, a fully finetuned model, or the untuned base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote

from qlora.config.paths import short_path
from qlora.config.schema import Config, TaskName
from qlora.errors import ConfigError, DamagedFile, DataError, UserError, mean, suggest
from qlora.runtime.run_folder import RunFolder, find_adapter
from qlora.runtime.saved_run import STATUS_FILE, Status, read_status

RUNS = Path("outputs/runs")
"""Where runs lie unless a command says otherwise."""
TAKE_BASE = (TaskName.chat, TaskName.evaluate, TaskName.predict, TaskName.serve)
"""The tasks that do their work with an untuned base, too."""


def find_trained(config: Config, overrides: Sequence[str], run_folder: Path) -> tuple[Path | None, Path | None]:
    """Returns the (adapter, fully finetuned model) of `adapter=`, or of the run's own folder where it is unset.

    Both are None for the untuned base: `adapter=none`, or a base that the command names where nothing was trained yet.
    Raises `ConfigError` for a folder that does not exist, and where nothing is named; `DataError` for one without
    either.
    """
    if config.adapter == "none":
        return None, None
    folder = Path(config.adapter).expanduser() if config.adapter is not None else run_folder
    trained = find_adapter(folder) if folder.is_dir() else (None, None)
    if trained != (None, None):
        return trained
    if config.adapter is None:
        if config.task.name in TAKE_BASE and names_base(config, overrides) and not RunFolder(folder).holds_training:
            return None, None
        raise _unset(config, folder)
    if not folder.is_dir():
        raise ConfigError(f"adapter={config.adapter}: no such folder{_near(folder)}")
    raise DataError(
        f"adapter={config.adapter}: {short_path(folder)} holds no adapter{_unfinished(folder)}; give adapter=FOLDER "
        "of an adapter or of a finished run, or adapter=none for the untuned base"
    )


def _near(folder: Path) -> str:
    """Returns which folder may be meant by one that does not exist: one beside it, a run of its name, or the newest."""
    trained = [path for parent in (folder.parent, RUNS) for path in parent.glob("*/") if any(find_adapter(path))]
    beside = suggest(str(folder), [str(path) for path in trained if path.parent == folder.parent])
    named = [str(path) for path in trained if path.name in suggest(folder.name, [path.name for path in trained])]
    if near := beside or named:
        return mean(near)
    newest = newest_finished([folder.parent, RUNS])
    if newest is not None:
        return f"; the newest finished run is {short_path(newest)}"
    return "" if trained else f"; no run in {short_path(folder.parent)} has finished"


def _unfinished(folder: Path) -> str:
    """Returns what is said of a run that has not finished; an empty text: the folder is none, or says nothing."""
    with contextlib.suppress(UserError):
        record = read_status(folder / STATUS_FILE)
        status = Status(record["status"]) if record is not None else None
        if status is Status.running:
            return " yet: its training run has not ended"
        if status in (Status.interrupted, Status.failed):
            ended = "failed" if status is Status.failed else "was interrupted"
            return f" yet: its training run {ended}, and resumes when its command is started again"
    return ""


def names_base(config: Config, overrides: Sequence[str]) -> bool:
    """Returns whether a command says which base it means: another than the default one, or that one by name."""
    return config.model.name != "tiny" or any(text.startswith(("model=", "model.name=")) for text in overrides)


def _unset(config: Config, folder: Path) -> ConfigError:
    """Returns the error for a task without `adapter=`, which offers the newest run."""
    newest = newest_finished([folder.parent, RUNS])
    what = f"{short_path(folder)} holds no adapter" if folder.is_dir() and _was_used(folder) else "adapter is not set"
    base = ", or adapter=none for the untuned base" if config.task.name in TAKE_BASE else ""
    task = config.task.name.value
    if newest is None:
        return ConfigError(f"{what}; write qlora {task} FOLDER with that of an adapter or of a finished run{base}")
    path = short_path(newest)
    return ConfigError(f"{what}; the newest finished run is {path}: write qlora {task} {quote(path)}{base}")


def _was_used(folder: Path) -> bool:
    """Returns whether a run has written into a folder."""
    return any(path.suffix == ".json" or path.name == "config.yaml" for path in folder.iterdir())


def newest_finished(folders: Iterable[Path]) -> Path | None:
    """Returns the run right below these folders that finished last and holds what it has trained; None: there is none.

    A run with a damaged result is left out.
    """
    finished_at: dict[Path, float] = {}
    for result in (path for folder in dict.fromkeys(folders) for path in folder.glob("*/result.json")):
        run = RunFolder(result.parent)
        try:
            is_finished = (run.stored_result("train") or {}).get("status") == "finished"
        except DamagedFile:
            continue
        if is_finished and find_adapter(run.path) != (None, None):
            finished_at[run.path] = result.stat().st_mtime
    return max(finished_at, key=lambda path: finished_at[path], default=None)
