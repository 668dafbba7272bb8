"""A run's folder: what lies where, and whether the same command may go on in it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.saved_config import flatten as flatten
from qlora.config.schema import Resume, Weights
from qlora.errors import ConfigError
from qlora.runtime.atomic_files import remove_temporary_files
from qlora.runtime.saved_run import read_manifest, read_result

log = logging.getLogger(__name__)

# What a run may change and still be the same training.
FREE_KEYS = (
    *("task", "tracking", "name", "objective", "device", "evaluation.show_predictions", "model.cache_dir"),
    *("data.cache_dir", "data.num_proc", "data.max_row_bytes", "adapter", "base", "repo", "runs", "run", "source"),
    *("trusted", "manifest", "merge", "plan", "trainer.profile", "trainer.parallel", "trainer.disk_wait"),
    *("trainer.save_total_limit", "watchdog", "resume", "sweep"),
)

ADDED_KEYS: dict[str, Any] = {"loss.name": "sft", "trainer.step_parts": []}
"""Keys that the configs of older runs lack, with the values that those runs have trained with."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and stored facts of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config of the training in this folder."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What the training in this folder was made of."""
        return self.path / "manifest.json"

    @property
    def baseline(self) -> Path:
        """What the untuned base scored."""
        return self.path / "baseline.json"

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

    @property
    def holds_training(self) -> bool:
        """Whether a training has begun here; one refused while its base was loaded has left a config alone."""
        return (
            self.manifest.is_file()
            or self.result("train").is_file()
            or any(self.checkpoints.glob("checkpoint-*"))
            or self.adapter.exists()
            or self.model.exists()
        )

    def result(self, task: str) -> Path:
        """The result of a task; training's is `result.json`."""
        return self.path / ("result.json" if task == "train" else f"{task}.json")

    def create(self) -> None:
        """Makes the folder and removes what killed processes left in it; raises `ConfigError` where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            remove_temporary_files(self.path)
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written ({error.strerror}); choose another with "
                "hydra.run.dir=FOLDER"
            ) from error

    def stored_result(self, task: str) -> dict[str, Any] | None:
        """Returns the result of a finished task, or None; raises `DamagedFile`."""
        return read_result(self.result(task))

    def stored_manifest(self) -> dict[str, Any] | None:
        """Returns what the training in this folder was made of, or None; raises `DamagedFile`."""
        return read_manifest(self.manifest)

    def check_unused(self) -> None:
        """Raises `ConfigError` if a training was started in this folder."""
        if self.config.is_file() and self.holds_training:
            raise ConfigError(
                f"{self.path} holds a run, which resume=never leaves alone; choose another folder "
                "(hydra.run.dir=FOLDER), or resume=auto to go on"
            )

    def check_same_training(
        self, stored: dict[str, Any] | None, config: dict[str, Any], free: Iterable[str] = ()
    ) -> bool:
        """Returns whether a training of this config was started in this folder, or none; `free` keys may differ.

        Raises `ConfigError` naming the changed keys if it was another; with `resume=force` they are a warning.
        """
        if stored is None:
            return True
        before, now = training_keys(stored), training_keys(config)
        keys = [key for key in {*before, *now} if not is_below(key, (*FREE_KEYS, *free))]
        if changes := describe_changes(before, now, keys):
            if config.get("resume") == Resume.force.value:
                log.warning("resume=force: going on with another config; changed:%s", changes)
                return False
            raise ConfigError(
                f"{self.path} holds a run with another config; changed:{changes}\n"
                "choose another folder (hydra.run.dir=FOLDER or name=NAME), or start with the same config to resume; "
                f"{_force(before, now)} goes on in spite of it, resume=never in a new folder"
            )
        return True

    def check_same_rows(self, stored: dict[str, Any] | None, report: dict[str, Any], config: dict[str, Any]) -> bool:
        """Returns whether the rows are those that the training in this folder began with, or it has none.

        `stored` and `report` are what was told of the rows then and now. Raises `ConfigError` if they are others,
        naming where they come from and what differs; with `resume=force` that is a warning.
        """
        if not (stored and stored["train_rows"] and report["train_rows"]):
            return True
        if stored["fingerprint"] == report["fingerprint"]:
            return True
        changes = describe_changes(stored, report, report.keys() - {"recognised"})
        data = config["data"]
        places = [f"data.mix.{name}.path={part['path']}" for name, part in data["mix"].items()]
        places += [f"data.{key}={data[key]}" for key in ("path", "eval_path") if data[key] is not None]
        what = f"the rows of {', '.join(places)} are not those that the run in {self.path} began with"
        if config.get("resume") == Resume.force.value:
            log.warning("resume=force: %s; changed:%s", what, changes)
            return False
        raise ConfigError(
            f"{what}; changed:{changes}\nput the old ones back, or choose another folder (hydra.run.dir=FOLDER or "
            "name=NAME); resume=force goes on with the new rows, resume=never in a new folder"
        )


def _force(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what goes on with another config: where that names another base, this takes a word of its own."""
    names = ["model.name", "model.revision", "model.weights"]
    if now.get("model.weights") == Weights.random.value:
        names += ["seed", "quantization.compute_dtype", "model.architecture"]
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "resume=force base=force" if any(is_below(key, names) for key in changed) else "resume=force"


def training_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a resolved config by full keys, with those that a config of an older run lacks."""
    return {**ADDED_KEYS, **dict(flatten(config))}


def config_digest(config: Mapping[str, Any], free: Iterable[str] = FREE_KEYS) -> str:
    """Returns the SHA-256 of a resolved config, however it was written, without the keys that are `free`."""
    free = tuple(free)
    facts = {
        key: value
        for key, value in flatten(config)
        if not is_below(key, free) and (key not in ADDED_KEYS or value != ADDED_KEYS[key])
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def is_below(key: str, parents: Iterable[str]) -> bool:
    """Returns whether a full key is one of `parents`, or lies in one of them."""
    return _is_below(key, tuple(parents))


@functools.lru_cache(2**14)
def _is_below(key: str, parents: tuple[str, ...]) -> bool:
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
