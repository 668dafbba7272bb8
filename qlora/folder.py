"""A run's folder: what lies where, and whether the same command may go on in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError

# What a run may change and still be the same training.
FREE_KEYS = (
    *("task", "tracking", "name", "objective", "device", "evaluation.show_predictions", "model.cache_dir"),
    *("data.cache_dir", "data.num_proc"),
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
    def drawn(self) -> Path:
        """The model that `model.init=random` drew for this run."""
        return self.path / "base"

    @property
    def predictions(self) -> Path:
        """Answers to held-out rows, one JSON object a line."""
        return self.path / "predictions.jsonl"

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
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not _is_free(key)]
        if changed:
            lines = "".join(f"\n  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:12])
            more = f"\n  and {len(changed) - 12} more" if len(changed) > 12 else ""
            raise ConfigError(
                f"{self.path} holds a run with another config; changed:{lines}{more}\n"
                "choose another folder (hydra.run.dir=FOLDER or name=NAME), or start with the same config to resume"
            )


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records that `write_lines` wrote; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields full keys and values of a nested config."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def find_adapter(place: Path) -> tuple[Path | None, Path | None]:
    """Returns (adapter folder, None) or (None, model folder) for a folder of an adapter or of a finished run."""
    for candidate in (place, place / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate, None
    if (place / "model" / "config.json").is_file():
        return None, place / "model"
    return None, None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, all or nothing."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.replace(path)
