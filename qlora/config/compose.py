"""Hydra composes the overrides of a command into one config; every mistake is a `ConfigError`.

Nothing here or below imports torch, so the answer to a mistake takes well under a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qlora.config import checked_loader, default_values, trust
from qlora.config.conversion import to_config
from qlora.config.file_spelling import reading_spellings
from qlora.config.messages import below_null, explain
from qlora.config.options import CONF_DIR
from qlora.config.overrides import check_keys, open_entries, parse_overrides, refuse_unreadable
from qlora.config.schema import Config, TaskName
from qlora.config.search_path import check_options, option_folder, search_folders
from qlora.errors import ConfigError, UserError
from qlora.upstream.hydra import Hydra, search_path_of

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
    ConfigStore.instance().store(name="schema", node=Config)
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


def compose_dict(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> DictConfig:
    """Composes `overrides` into the `DictConfig` that Hydra hands to a job, the `hydra` node included."""
    trust.check_version()
    register()
    refuse_unreadable(overrides)
    overrides = open_entries(overrides)
    try:
        with opened_hydra(overrides, config_dir) as hydra:
            check_keys(overrides, hydra)
            composed = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
            _check_job_folder(composed)
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


def _search_path(config_dir: Path | str | None, overrides: Sequence[str]) -> Any:
    folders = [option_folder(str(config_dir), "--config-dir")] if config_dir is not None else []
    folders += search_folders(parse_overrides(overrides))
    if folders:
        check_options(folders, CONF_DIR)
    search_path = search_path_of(CONF_DIR)
    for folder in folders:
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return search_path
