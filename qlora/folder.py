"""A run's folder: what lies where, and whether the same command may go on in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError

# What a run may change and still be the same training.
FREE_KEYS = (
    *("task", "tracking", "name", "objective", "device", "evaluation.show_predictions", "model.cache_dir"),
    *("data.cache_dir", "data.num_proc", "adapter", "repo", "runs", "run", "source", "trusted", "merge", "plan"),
    "trainer.profile",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths and stored facts of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config of the training in this folder."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints with optimizer, scheduler and random state."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The finished model of a full finetuning."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """The model that `task=merge` made of base and adapter."""
        return self.path / "merged"

    @property
    def drawn(self) -> Path:
        """What decided the base that `model.weights=random` drew for this training."""
        return self.path / "drawn.json"

    @property
    def predictions(self) -> Path:
        """Answers to held-out rows, one JSON object a line."""
        return self.path / "predictions.jsonl"

    @property
    def unfinished_predictions(self) -> Path:
        """Answers of `task=predict` while they are generated."""
        return self.path / "predictions.unfinished.jsonl"

    @property
    def history(self) -> Path:
        """What the training logged at each step."""
        return self.path / "history.json"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def progress(self) -> Path:
        """The latest step of a training, for whoever watches from outside."""
        return self.path / "progress.json"

    @property
    def trace(self) -> Path:
        """What `trainer.profile` recorded of some steps, as a Chrome trace."""
        return self.path / "profile" / "trace.json.gz"

    def result(self, task: str) -> Path:
        """The result of a task; training's is `result.json`."""
        return self.path / ("result.json" if task == "train" else f"{task}.json")

    def create(self) -> None:
        """Makes the folder; raises `ConfigError` where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written ({error.strerror}); choose another with "
                "hydra.run.dir=FOLDER"
            ) from error

    def stored_result(self, task: str) -> dict[str, Any] | None:
        """Returns the result of a finished task, or None."""
        return read_json(self.result(task))

    def check_same_training(self, stored: dict[str, Any] | None, config: dict[str, Any]) -> None:
        """Raises `ConfigError` naming the changed keys if another training was started in this folder."""
        if stored is None:
            return
        before, now = dict(flatten(stored)), dict(flatten(config))
        keys = [key for key in {*before, *now} if not is_below(key, FREE_KEYS)]
        if changes := describe_changes(before, now, keys):
            raise ConfigError(
                f"{self.path} holds a run with another config; changed:{changes}\n"
                "choose another folder (hydra.run.dir=FOLDER or name=NAME), or start with the same config to resume"
            )


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; raises `ConfigError` where the folder cannot be written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); free some space or mend the folder's permissions, or "
            "choose another folder with hydra.run.dir=FOLDER"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()  # there only after a failure


def read_lines(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Returns the first `count` records that `write_lines` wrote, or all; none where there is no such file."""
    return list(islice(iter_lines(path), count)) if path.is_file() else []


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records that `write_lines` wrote."""
    with path.open("rb") as file:  # in a text there are more ends of lines than the one between records
        yield from map(json.loads, file)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields full keys and values of a nested config."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_below(key: str, parents: Iterable[str]) -> bool:
    """Returns whether a full key is one of `parents`, or lies in one of them."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Returns those of the full keys that have another value now, in lines of their own; "" where none has."""
    changed = [key for key in sorted(keys) if before.get(key) != now.get(key)]
    lines = "".join(f"\n  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:12])
    return lines + (f"\n  and {len(changed) - 12} more" if len(changed) > 12 else "")


def find_adapter(place: Path) -> tuple[Path | None, Path | None]:
    """Returns (adapter folder, None) or (None, model folder) for a folder of one of them or of a finished run."""
    for candidate in (place, place / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate, None
    for candidate in (place / "model", place / "merged", place):
        if (candidate / "config.json").is_file():
            return None, candidate
    return None, None


def replace_folder(new: Path, place: Path) -> None:
    """Puts a folder in place of another by renaming; after a crash `restore_folder` finds the old one."""
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(place: Path) -> None:
    """Brings back the folder that a crash of `replace_folder` left aside."""
    old = place.with_name(f"{place.name}.old")
    if old.exists() and not place.exists():
        old.rename(place)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, all or nothing."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.replace(path)
