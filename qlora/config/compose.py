"""Hydra composes the overrides of a command into one config; every mistake is a `ConfigError`.

Nothing here or below imports torch, so the answer to a mistake takes well under a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qlora.config import checked_loader, default_values, preset_facts, trained_run, trust
from qlora.config.arguments import folder_override
from qlora.config.conversion import to_config
from qlora.config.file_spelling import reading_spellings
from qlora.config.messages import below_null, explain
from qlora.config.options import CONF_DIR
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import check_keys, open_entries, parse_overrides, refuse_unreadable
from qlora.config.saved_base import read_stored
from qlora.config.schema import Config, TaskName
from qlora.config.search_path import check_options, option_folder, search_folders
from qlora.config.typed_forms import Reading, check_own_rows, read_forms
from qlora.errors import ConfigError, UserError
from qlora.upstream.hydra import Hydra, add_schema, search_path_of

PLUGINS = Path(__file__).parent.parent / "plugins"

VERSION_BASE = "1.3"
"""The version whose rules Hydra keeps to, wherever it composes."""

LOOKS, RUNS = "looks", "runs"
"""The folders below `outputs`: of tasks whose result is only to be looked at, and of all others."""

START_VARIABLE = "QLORA_START"
"""The environment variable with the time that several processes started at, as it names the folder of them all."""

JOB_FOLDER = "${qlora.job_name:}"
"""The value of `hydra.sweep.subdir` in `conf/config.yaml`."""


def register() -> None:
    """Tells Hydra the root schema and the resolver of `config.yaml`; may be called many times."""
    add_schema("schema", Config)
    OmegaConf.register_new_resolver(
        "qlora.folder",
        lambda name: name or os.environ.get(START_VARIABLE) or now(),
        use_cache=True,
        replace=True,
    )
    OmegaConf.register_new_resolver(
        "qlora.kind", lambda task: LOOKS if TaskName(task).only_looks else RUNS, replace=True
    )
    default_values.register()
    if PLUGINS.is_dir() and str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))  # a checkout that is not installed; Hydra looks for a package hydra_plugins
    checked_loader.install(CONF_DIR)


def now() -> str:
    """Returns the time as it names a folder."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def compose(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Config:
    """Returns the checked config of `overrides`, as the command line would read them.

    `config_dir` holds the user's own groups and options (`--config-dir`). Raises `ConfigError` for every mistake.
    """
    return to_config(compose_dict(overrides, config_dir))


def compose_dict(
    overrides: Sequence[str] = (),
    config_dir: Path | str | None = None,
    *,
    leave_swept: bool = False,
    is_read: bool = False,
    in_command: bool = False,
) -> DictConfig:
    """Composes `overrides` into the `DictConfig` that Hydra hands to a job, the `hydra` node included.

    With `leave_swept`, keys that are given several values stay as they are without them. `is_read`: the overrides are
    those that `read_typed` has returned. `in_command`: the options are those that the running command finds.
    """
    trust.check_version()
    register()
    refuse_unreadable(overrides)
    overrides = open_entries(overrides if is_read else read_typed(overrides, config_dir).overrides)
    running = GlobalHydra.instance().hydra if in_command else None
    try:
        with nullcontext(running) if running is not None else opened_hydra(overrides, config_dir) as hydra:
            check_keys(overrides, hydra)
            swept = leave_swept and any(override.is_sweep_override() for override in parse_overrides(overrides))
            mode = RunMode.MULTIRUN if swept else RunMode.RUN
            composed = _compose(partial(_compose_once, hydra, mode), overrides, config_dir)
            _check_job_folder(composed)
            with suppress(ConfigError) if swept else nullcontext():  # a job that names another base reads it anew
                read_stored(composed, parse_overrides(overrides))
            check_own_rows(composed, overrides)
            return composed
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Hydra raises a plain ValueError for a broken defaults list, Python one for a file that is not UTF-8.
        raise explain(error, config_dir) from error
    except AssertionError as error:
        if "Unexpected type for root" not in str(error):
            raise
        raise below_null(overrides) from error
    except RecursionError as error:
        where = f" in {config_dir}" if config_dir is not None else ""
        raise ConfigError(
            f"a config file{where} includes itself, or two include each other; correct their defaults lists"
        ) from error


Composer = Callable[[Sequence[str]], DictConfig]


def _compose(compose_once: Composer, overrides: Sequence[str], config_dir: Path | str | None) -> DictConfig:
    """Composes again where an adapter's run, or another model than the preset's, changes what the options mean."""
    composed = compose_once(overrides)
    parsed, choices = parse_overrides(overrides), composed.hydra.runtime.choices
    run = _used_run(composed)
    if run is not None:
        with trained_run.as_options(run, choices, parsed) as options:
            composed = _recompose(compose_once, composed, overrides, options)
        trained_run.keep_settings(composed, run, parsed)
        described = run.values.get("model", {}) if composed.hydra.runtime.choices.model == trained_run.OPTION else {}
    else:
        folders = [CONF_DIR, *_option_folders(config_dir, overrides)]
        described = preset_facts.read_preset(choices.get("model"), folders)
    if preset_facts.is_another(composed, described):
        if run is None and not any(override.key_or_group == "recipe" for override in parsed):
            composed = _recompose(compose_once, composed, overrides, ["recipe=none"])
        preset_facts.drop_facts(composed, described, parsed)
    return composed


def _compose_once(hydra: Hydra, mode: RunMode, overrides: Sequence[str]) -> DictConfig:
    composed = hydra.compose_config("config", list(overrides), run_mode=mode, from_shell=False)
    assert isinstance(composed, DictConfig)
    return composed


def _recompose(
    compose_once: Composer, composed: DictConfig, overrides: Sequence[str], options: Sequence[str]
) -> DictConfig:
    """Composes with more options, which are no overrides of the command."""
    again = compose_once([*overrides, *options])
    again.hydra.overrides = composed.hydra.overrides
    again.hydra.job.override_dirname = composed.hydra.job.override_dirname
    return again


def _used_run(composed: DictConfig) -> trained_run.TrainedRun | None:
    """Returns the run whose adapter the task uses, with its config; None: it uses none, or nothing says its config."""
    task = None if OmegaConf.is_missing(composed.task, "name") else composed.task.name
    adapter = composed.adapter
    if task is None or not (trained_run.uses_adapter(task) or adapter is not None):
        return None
    named = composed.name is not None or folder_override(list(composed.hydra.overrides.hydra)) is not None
    folder = trained_run.find_run(adapter, str(composed.hydra.run.dir) if named and adapter is None else None)
    return None if folder is None else trained_run.read_run(folder, task, adapter)


@contextmanager
def opened_hydra(overrides: Sequence[str], config_dir: Path | str | None) -> Iterator[Hydra]:
    """Yields Hydra with our options and the user's own, as the instance of this process."""
    register()
    setbase(VERSION_BASE)
    instance = GlobalHydra.instance()
    outer = instance.hydra
    instance.clear()
    try:
        with reading_spellings(CONF_DIR):
            yield Hydra.create_main_hydra2("qlora", _search_path(config_dir, overrides))
    finally:
        instance.clear()
        if outer is not None:
            instance.initialize(outer)


def _check_job_folder(composed: DictConfig) -> None:
    nodes: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    if nodes["sweep"]["subdir"] != JOB_FOLDER:
        raise ConfigError(
            "hydra.sweep.subdir cannot be set: a job's folder is named after its overrides and its config, by which a "
            "sweep resumes; leave it out, and choose the sweep's folder with hydra.sweep.dir=FOLDER"
        )


def read_typed(overrides: Sequence[str], config_dir: Path | str | None = None) -> Reading:
    """Returns what `read_forms` makes of overrides, the user's own options known."""
    overrides = keep_spelling(overrides)
    return read_forms(overrides, _option_folders(config_dir, overrides))


def _option_folders(config_dir: Path | str | None, overrides: Sequence[str]) -> list[Path]:
    """Returns the folders with options of the user's own."""
    folders = [option_folder(str(config_dir), "--config-dir")] if config_dir is not None else []
    return folders + search_folders(parse_overrides(overrides))


def _search_path(config_dir: Path | str | None, overrides: Sequence[str]) -> Any:
    folders = _option_folders(config_dir, overrides)
    if folders:
        check_options(folders, CONF_DIR)
    search_path = search_path_of(CONF_DIR)
    for folder in folders:
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return search_path
