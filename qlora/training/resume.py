"""From where a training run resumes in its folder, and what it says about that."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.overrides import override_value
from qlora.config.paths import short_path
from qlora.config.schema import Config, Resume
from qlora.errors import RunError
from qlora.runtime import distributed
from qlora.runtime.atomic_files import write_text
from qlora.runtime.row_processes import row_takers
from qlora.runtime.run_folder import RunFolder, config_digest
from qlora.runtime.trained import RUNS
from qlora.text import quoted, terminal_width, wrap_command
from qlora.training.checkpoints import find_checkpoints, last_checkpoint, read_metadata, step_of

log = logging.getLogger(__name__)

CACHES_REFERENCE = "caches_reference"
"""The key of a checkpoint's metadata that says whether its run reads the reference of pairs from a cache."""
ANOTHER_FOLDER = "choose another folder (hydra.run.dir=FOLDER or name=NAME)"


def find_checkpoint(folder: RunFolder, config: Config, resolved: Mapping[str, Any], *, rows_a_step: int) -> Path | None:
    """Returns the checkpoint to resume from; None: there is none that can be read.

    `resolved` is the config in plain types. Ids of trackers that the folder lacks come back from the checkpoint.
    """
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return None
    metadata, force = read_metadata(checkpoint), config.resume is Resume.force
    if not (folder.config.is_file() or force) and metadata["config"] != config_digest(resolved):
        raise RunError(
            f"{checkpoint} was written with another config, and {folder.config}, which would say which one, is "
            f"missing; {ANOTHER_FOLDER}, or resume=force to use it"
        )
    _check_processes(checkpoint, metadata, config, rows_a_step)
    for name, text in metadata["trackers"].items():
        if not (folder.path / name).is_file():
            write_text(folder.path / name, text)
    return checkpoint


def _check_processes(checkpoint: Path, written: Mapping[str, Any], config: Config, rows_a_step: int) -> None:
    """Raises `RunError` for a checkpoint of more or fewer processes; with `resume=force` it is a warning."""
    previous, rows = written["processes"], written.get("rows")
    if previous == distributed.world_size():
        return
    what = (
        f"{checkpoint} was written by {previous} process{'es' if previous > 1 else ''}, and this run has "
        f"{distributed.world_size()}: its steps hold "
    )
    if config.resume is Resume.force:
        same = "the same rows, but dropout draws other masks" if rows == rows_a_step else "other rows"
        log.warning("resume=force: %s%s", what, same)
        return
    accumulated, rest = divmod(
        rows or 0, config.trainer.per_device_train_batch_size * row_takers(config.trainer.context_parallel)
    )
    same = f", with the same rows if trainer.gradient_accumulation_steps={accumulated}" if rows and not rest else ""
    raise RunError(
        f"{what}other rows; start {previous} again, or {ANOTHER_FOLDER}; resume=force resumes in spite of it{same}"
    )


def check_prompts(checkpoint: Path, config: Config, *, shares_prompts: bool) -> None:
    """Raises `RunError` where rows come in another order than before, as prompts count otherwise; or warns (`force`).

    `shares_prompts` says whether the step computes the prompt of a pair once, which follows from the device, too.
    """
    is_ordered = config.data.packing or config.trainer.group_by_length
    if not is_ordered or read_metadata(checkpoint).get("shares_prompts", False) == shares_prompts:
        return
    what = "packs" if config.data.packing else "rows that are grouped by length (trainer.group_by_length)"
    previous, now = ("twice", "once") if shares_prompts else ("once", "twice")
    message = (
        f"{checkpoint} was written by a step that computed the prompt of a pair {previous}, and here it is computed "
        f"{now} (trainer.fused_attention): {what} come in another order"
    )
    if config.resume is Resume.force:
        log.warning("resume=force: %s", message)
        return
    raise RunError(
        f"{message}; resume on the kind of device where the run began, or {ANOTHER_FOLDER}; resume=force resumes in "
        "spite of it"
    )


def how_to_resume(folder: RunFolder, args: Sequence[str]) -> str:
    """Returns what is saved of a stopped run, and the command that resumes it: the one that started it with `args`."""
    saved = find_checkpoints(folder.checkpoints)
    state = (
        f"step {step_of(saved[-1]):,} is saved in {short_path(saved[-1])}" if saved else "there is no checkpoint yet"
    )
    command = shlex.join([*distributed.command(), *_naming(folder.path, args)])
    return "\n".join([f"{state}; resume with", *wrap_command(command, terminal_width())])


def _naming(path: Path, args: Sequence[str]) -> list[str]:
    """Returns the args of a command as they start it in the folder `path` again: one without a name gets one."""
    named, in_runs = ("name=", "hydra.run.dir="), path.parent.absolute() == RUNS.absolute()
    kept = [text for text in args if not text.startswith("resume=")]
    last = next((text for text in reversed(kept) if text.startswith(named)), None)
    folder = None if last is None else Path(str(override_value(last)))
    if (
        folder is not None
        and (RUNS / folder if last and last.startswith("name=") else folder).absolute() == path.absolute()
    ):
        return kept
    name = f"name={quoted(path.name)}" if in_runs else f"hydra.run.dir={quoted(short_path(path))}"
    return [*(text for text in kept if not text.startswith(named)), name]
