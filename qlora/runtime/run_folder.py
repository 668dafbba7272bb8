"""The folder of a run: the paths in it, and the check that the same command may resume there."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.saved_config import flatten as flatten
from qlora.config.schema import LOSS_SETTINGS, MIXTURE_FIELDS, Resume, Weights
from qlora.errors import ResourceError, RunError
from qlora.runtime.atomic_files import remove_temporary_files
from qlora.runtime.saved_run import read_manifest, read_result

log = logging.getLogger(__name__)

# What a run may change and still be the same training.
FREE_KEYS = (
    *("task", "tracking", "name", "objective", "device", "evaluation.show_predictions", "model.cache_dir"),
    *("data.cache_dir", "data.num_proc", "data.max_row_bytes", "adapter", "base", "repo", "runs", "run", "source"),
    *(
        "trusted",
        "manifest",
        "merge",
        "export",
        "verify",
        "serve",
        "plan",
        "trainer.profile",
        "trainer.parallel",
        "trainer.disk_wait",
    ),
    *("trainer.save_total_limit", "quantization.experts_offload", "watchdog", "resume", "sweep"),
)

ADDED_KEYS: dict[str, Any] = {
    "loss.name": "sft",
    **{f"loss.{name}": None for name in LOSS_SETTINGS},
    "loss.cache_reference": "auto",
    "evaluation.win": None,
    "head.name": "causal",
    "head.labels": None,
    "head.dtype": None,
    "head.pooling": None,
    "data.label": None,
    "trainer.step_parts": [],
    "quantization.method": "auto",
    "quantization.experts": "same",
    "data.max_samples": None,
    "data.pairs": "best-worst",
    "data.overlap": "exact",
    "data.streaming": False,
    "data.shuffle_buffer": 1000,
    "data.stop": None,
    "data.probability": None,
    "lora.start": None,
    "model.rope_scaling": None,
    "trainer.context_parallel": 1,
    "lora.experts": "auto",
    "lora.expert_r": None,
    "lora.router": False,
    "lora.per_expert": False,
    "lora.kind": "lora",
    "lora.options": {},
    "lora.layers": None,
    "lora.exclude": [],
    "lora.modules_to_save": [],
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
    "lora.freeze_a": False,
    "lora.parameters": None,
    "trainer.cuda_graphs": "auto",
    "trainer.label_smoothing_factor": 0.0,
    "trainer.neftune_noise_alpha": None,
    "trainer.keep": "last",
    "trainer.keep_metric": None,
    "task.port": 8642,
    "generation.loop": "auto",
    "generation.weights": "auto",
    **{f"model.architecture.{name}": None for name in MIXTURE_FIELDS},
}
"""Keys that the configs of older runs lack, with the values that those runs have trained with; of `data`, also those
of the entries of `data.mix`."""

FORMER_DEFAULTS: dict[str, Any] = {"generation.max_new_tokens": 256, "generation.batch_size": 16}
"""Keys that may be null, with the values that the configs of older runs hold where nothing was asked for."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and stored records of one run."""

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
    def adapter_per_expert(self) -> Path:
        """The finished adapter with names for each expert's layers."""
        return self.path / "adapter_per_expert"

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
    def base_predictions(self) -> Path:
        """Answers of the untuned base to the same rows, one JSON object a line."""
        return self.path / "base_predictions.jsonl"

    @property
    def examples(self) -> Path:
        """Some rows of the training set as the model sees them, one JSON object a line."""
        return self.path / "examples.jsonl"

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
        """The latest training step, for programs that watch the run."""
        return self.path / "progress.json"

    @property
    def trace(self) -> Path:
        """The Chrome trace of the steps that `trainer.profile` recorded."""
        return self.path / "profile" / "trace.json.gz"

    @property
    def holds_training(self) -> bool:
        """Whether training has begun here; a run that failed while its base was loaded left only a config."""
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
        """Creates the folder and removes temporary files of killed processes; raises `ResourceError` if that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            remove_temporary_files(self.path)
        except OSError as error:
            raise ResourceError(
                f"the run folder {self.path} cannot be written ({error.strerror}); choose another with "
                "hydra.run.dir=FOLDER"
            ) from error

    def stored_result(self, task: str) -> dict[str, Any] | None:
        """Returns the result of a finished task, or None; raises `DamagedFile`."""
        return read_result(self.result(task))

    def stored_manifest(self) -> dict[str, Any] | None:
        """Returns the manifest of the run in this folder, or None; raises `DamagedFile`."""
        return read_manifest(self.manifest)

    def check_unused(self) -> None:
        """Raises `RunError` if training was started in this folder."""
        if self.config.is_file() and self.holds_training:
            raise RunError(
                f"{self.path} holds a run, which resume=never does not touch; choose another folder "
                "(hydra.run.dir=FOLDER), or resume=auto to resume it"
            )

    def check_same_training(
        self, saved: dict[str, Any] | None, config: dict[str, Any], free: Iterable[str] = ()
    ) -> bool:
        """Returns whether training in this folder was started with this config, or not at all; `free` keys may differ.

        Raises `RunError` with the changed keys for another config; with `resume=force` it logs a warning instead.
        """
        if saved is None:
            return True
        previous, now = training_keys(saved), training_keys(config)
        keys = [key for key in {*previous, *now} if not is_below(key, (*FREE_KEYS, *free))]
        if changes := describe_changes(previous, now, keys):
            if config.get("resume") == Resume.force.value:
                log.warning("resume=force: resuming with another config; changed:%s", changes)
                return False
            raise RunError(
                f"{self.path} holds a run with another config; changed:{changes}\n"
                "choose another folder (hydra.run.dir=FOLDER or name=NAME), or start with the same config to resume; "
                f"{_force(previous, now)} resumes nevertheless, resume=never starts in a new folder"
            )
        return True

    def check_same_rows(self, saved: dict[str, Any] | None, report: dict[str, Any], config: dict[str, Any]) -> bool:
        """Returns whether the rows are those with which training in this folder began, or whether it has none.

        `saved` and `report` describe the rows then and now. Raises `RunError` for other rows, with their sources and
        the differences; with `resume=force` it logs a warning instead.
        """
        if not (saved and saved["train_rows"] and report["train_rows"]):
            return True
        if saved["fingerprint"] == report["fingerprint"]:
            return True
        changes = describe_changes(saved, report, report.keys() - {"recognised"})
        data = config["data"]
        sources = [f"data.mix.{name}.path={part['path']}" for name, part in data["mix"].items()]
        sources += [f"data.{key}={data[key]}" for key in ("path", "eval_path") if data[key] is not None]
        what = f"the rows of {', '.join(sources)} are not those with which the run in {self.path} began"
        if config.get("resume") == Resume.force.value:
            log.warning("resume=force: %s; changed:%s", what, changes)
            return False
        raise RunError(
            f"{what}; changed:{changes}\nrestore the old rows, or choose another folder (hydra.run.dir=FOLDER or "
            "name=NAME); resume=force resumes with the new rows, resume=never starts in a new folder"
        )


def _force(previous: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the overrides that resume with another config; another base needs an override of its own."""
    names = ["model.name", "model.revision", "model.weights"]
    if now.get("model.weights") == Weights.random.value:
        names += ["seed", "quantization.compute_dtype", "model.architecture"]
    changed = [key for key in {**previous, **now} if previous.get(key) != now.get(key)]
    return "resume=force base=force" if any(is_below(key, names) for key in changed) else "resume=force"


def training_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a resolved config by full keys, with those that a config of an older run lacks."""
    return {**ADDED_KEYS, **{key: _former(key, value) for key, value in flatten(config)}}


def _former(key: str, value: Any) -> Any:
    """Returns the value of a key as an older run has recorded it."""
    return FORMER_DEFAULTS.get(key) if value is None else value


def config_digest(config: Mapping[str, Any], free: Iterable[str] = FREE_KEYS) -> str:
    """Returns the SHA-256 of a resolved config without its `free` keys, for any spelling of the config."""
    free = tuple(free)
    values = {
        key: _former(key, value)
        for key, value in flatten(config)
        if not is_below(key, free) and not _is_as_before(key, value)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _is_as_before(key: str, value: Any) -> bool:
    """Returns whether older configs lack a key, and trained with this value of it."""
    key = re.sub(r"^data\.mix\.[^.]+\.", "data.", key)
    return key in ADDED_KEYS and value == ADDED_KEYS[key]


def is_below(key: str, parents: Iterable[str]) -> bool:
    """Returns whether a full key is one of `parents` or lies below one of them."""
    return _is_below(key, tuple(parents))


@functools.lru_cache(2**14)
def _is_below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def describe_changes(previous: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Returns the full keys whose values have changed, one a line; "" if none has."""
    changed = [key for key in sorted(keys) if previous.get(key) != now.get(key)]
    lines = "".join(f"\n  {key}: {previous.get(key)!r} -> {now.get(key)!r}" for key in changed[:12])
    return lines + (f"\n  and {len(changed) - 12} more" if len(changed) > 12 else "")


def find_adapter(folder: Path) -> tuple[Path | None, Path | None]:
    """Returns (adapter folder, None) or (None, model folder) for such a folder or that of a finished run."""
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate, None
    for candidate in (folder / "model", folder / "merged", folder):
        if (candidate / "config.json").is_file():
            return None, candidate
    return None, None
