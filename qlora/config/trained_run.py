"""What a task that uses an adapter takes from the config of the run that trained it.

The config of a run may come from a stranger: of it only values are taken, as the text that they are. Whom to trust and
what to run is the command line's alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config.default_values import default_options_beside
from qlora.config.messages import explain
from qlora.config.options import CONF_DIR
from qlora.config.paths import NAMES_OR_PATHS
from qlora.config.saved_config import as_text, flatten, read_config
from qlora.config.schema import FUNCTION_PATH, OWN_FUNCTIONS, TASK_KEYS, Config, DataConfig, TaskName
from qlora.config.secret_values import leaves, refuse_secrets
from qlora.errors import ConfigError, UserError

CONFIG_FILE, MANIFEST_FILE = "config.yaml", "manifest.json"
GROUPS = ("model", "quantization", "lora", "data", "trainer", "loss", "head", "evaluation", "generation")
"""The groups that describe what was trained and how it was measured."""
SETTINGS = ("seed", *GROUPS)
"""All that is taken of a run."""
OF_MACHINE = (
    *("model.trust_remote_code", "model.cache_dir", "data.cache_dir", "data.num_proc"),
    *("model.license", "model.gated", "model.architecture"),
)
"""Keys below `SETTINGS` that say nothing of a training run: trust, a machine's folders, what is known of the base."""
NOT_TAKEN = OF_MACHINE[:4]
KEPT = {"seed": Config, "data.template": DataConfig, "data.train_on": DataConfig}
"""Keys that stay the run's beside a data set that the command chooses, with the classes that declare them."""
EXCLUDED: dict[str, dict[str, Any]] = {
    "eval_path": {"eval_split": None},
    "eval_split": {"eval_path": None},
    "path": {"mix": {}},
    "mix": {"path": None},
}
"""Fields of `data` that exclude others: where the command gives one, the run's other one is unset."""
ROWS = {"path": OWN_FUNCTIONS[0], "eval_path": None, "format": "auto"}
"""Fields of `data` that may name the user's functions, with what stands for them where no row is read."""
OPTION = "_trained_"
"""The name under which Hydra finds the run's values of a group, as an option of it."""
PARTS = ("adapter", "model", "merged")
"""The folders of a run that `adapter=` may name in place of the run."""


@dataclass(frozen=True)
class TrainedRun:
    """The stored config of a run."""

    values: dict[str, Any]
    """What is taken of it: `SETTINGS` without trust and code."""
    is_merged: bool
    """Whether a merged model is used, whose weights have been quantized and are not to be again."""


def uses_adapter(task: TaskName) -> bool:
    """Returns whether a task uses what was trained before."""
    return task in TASK_KEYS["adapter"]


def find_run(adapter: str | None, own_folder: Path | str | None = None) -> Path | None:
    """Returns the folder of the run that `adapter=` names, or of the task's own folder, if it has a config.

    None for `adapter=none`, and for an adapter without its run.
    """
    named = adapter if adapter is not None else own_folder
    if named is None or adapter == "none":
        return None
    folder = Path(named).expanduser()
    folders = [folder, *([folder.parent] if folder.name in PARTS else [])]
    folders += [folder.parent.parent] if folder.parent.name == "checkpoints" else []
    return next((path for path in folders if (path / CONFIG_FILE).is_file()), None)


def read_run(folder: Path, task: TaskName, adapter: str | None) -> TrainedRun:
    """Returns what `task` takes of a run for `adapter=`; raises a `UserError` for a config that cannot be used."""
    file = folder / CONFIG_FILE
    saved = read_config(file) or {}
    values = {name: saved[name] for name in SETTINGS if saved.get(name) is not None}
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for key in NOT_TAKEN:
        group, _, name = key.partition(".")
        values.get(group, {}).pop(name, None)
    _leave_code_out(values, task)
    _anchor(values, folder)
    try:
        refuse_secrets(leaves(values, ""))
        OmegaConf.merge(OmegaConf.structured(Config), as_text(values))
    except UserError as error:
        raise ConfigError(f"{file}: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {explain(error)}") from error
    return TrainedRun(values, _is_merged(Path(adapter).expanduser() if adapter is not None else folder))


def _is_merged(folder: Path) -> bool:
    """Returns whether a folder is that of a merged model, or of a run that holds nothing else."""
    others = ("adapter_config.json", "adapter/adapter_config.json", "model/config.json")
    is_run = (folder / "merged" / "config.json").is_file() and not any((folder / name).is_file() for name in others)
    return is_run or folder.name == "merged"


def _leave_code_out(values: dict[str, Any], task: TaskName) -> None:
    """Takes the names of functions out that a finished adapter does not need; the others need trust, as everywhere."""
    for group, name in (("evaluation", "metrics"), ("trainer", "step_parts")):
        if isinstance(names := values.get(group, {}).get(name), list):
            values[group][name] = [text for text in names if ":" not in str(text)]
    if FUNCTION_PATH.fullmatch(str(values.get("loss", {}).get("name"))):
        del values["loss"]["name"]
    data = values.get("data", {})
    if task in (TaskName.chat, TaskName.push, TaskName.serve):  # which read no rows
        named = [name for name in ROWS if FUNCTION_PATH.fullmatch(str(data.get(name)))]
        data |= {name: ROWS[name] for name in named if data[name] not in OWN_FUNCTIONS}


def _anchor(values: dict[str, Any], folder: Path) -> None:
    """Makes paths that are relative to where the run was started whole, where they are found there and not here."""
    try:
        began = Path(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["working_directory"])
    except (OSError, ValueError, TypeError, KeyError):
        return
    if began == Path.cwd():
        return
    for owner, name in _paths(values):
        if isinstance(text := owner.get(name), str) and not FUNCTION_PATH.fullmatch(text):
            path = began / text
            if not Path(text).is_absolute() and not text.startswith("~") and path.exists():
                owner[name] = str(path)


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields what holds each path, and its name there."""
    for key in (*NAMES_OR_PATHS, "evaluation.path"):
        group, _, name = key.partition(".")
        if name and isinstance(values.get(group), dict):
            yield values[group], name
    mix = values.get("data", {}).get("mix")
    for name, part in mix.items() if isinstance(mix, dict) else ():
        yield from ((part, field) for field in ("path", "template")) if isinstance(part, dict) else [(mix, name)]


@contextmanager
def as_options(run: TrainedRun, choices: Mapping[str, Any], overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Yields overrides that choose the run's values for all groups but those of which an option was chosen.

    `choices` are the options that Hydra has composed from `overrides`.
    """
    store, typed = ConfigStore.instance(), {override.key_or_group for override in overrides}
    unset = default_options_beside(choices)
    values = _without_excluded(run.values, typed)
    groups = [name for name in GROUPS if name not in typed and choices.get(name) == unset.get(name)]
    merged = ["quantization=none"] if run.is_merged and "quantization" in groups else []
    groups = [name for name in groups if not (merged and name == "quantization")]
    for name in groups:
        store.store(group=name, name=OPTION, node=_with_default(name, unset[name], values.get(name, {})))
    try:
        # A recipe describes another training run.
        yield [*(f"{name}={OPTION}" for name in groups), *merged, *([] if "recipe" in typed else ["recipe=none"])]
    finally:
        for name in groups:
            del store.repo[name][f"{OPTION}.yaml"]


def _without_excluded(values: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Returns the run's values without those that exclude what the command gives."""
    data = dict(values.get("data", {}))
    for name, excluded in EXCLUDED.items():
        if any(key == f"data.{name}" or key.startswith(f"data.{name}.") for key in typed):
            data |= {other: unset for other, unset in excluded.items() if f"data.{other}" not in typed}
    return {**values, "data": data}


def _with_default(group: str, option: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a group, with those of its default option for keys that an older version did not know."""
    node = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{option}.yaml"), resolve=False)
    known = {str(key): value for key, value in node.items() if key != "defaults"} if isinstance(node, dict) else {}
    return known | as_text(values)


def keep_settings(composed: DictConfig, run: TrainedRun, overrides: Sequence[Override]) -> None:
    """Sets the seed, and how conversations are written, as in the run where the command leaves them at their default.

    They are no part of an option, or those of a data set that the command chose.
    """
    typed, saved = {override.key_or_group for override in overrides}, dict(flatten(run.values))
    for key, owner in KEPT.items():
        unset = next(item.default for item in fields(owner) if item.name == key.rpartition(".")[2])
        if key in saved and key not in typed and OmegaConf.select(composed, key) == unset:
            OmegaConf.update(composed, key, as_text(saved[key]))


def differences(now: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the full keys of `SETTINGS` whose values differ: what holds now, and what the training had."""
    flat = [{key: value for name in SETTINGS if name in tree for key, value in flatten({name: tree[name]})
             if not key.startswith(OF_MACHINE)} for tree in (now, trained)]  # fmt: skip
    return {key: (flat[0][key], flat[1][key]) for key in flat[0] if key in flat[1] and flat[0][key] != flat[1][key]}
