"""Runs a config that is composed already, as `hydra.main` does after it has composed one.

`hydra.main` takes its overrides from `sys.argv` and composes the config itself, twice for a single run. Hydra has no
public function for a config that is there already, so the two functions that follow a composition are repeated here:
`Hydra.run` and `Hydra.multirun`. The contract test compares their source with that of known versions. What prints a
config gets the composed one too.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from typing import Any

from hydra._internal import hydra as hydra_module
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser as get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

CONFIG_NAME = "config"


def add_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Applies overrides of plain keys to a composed config, as if they had stood behind the others."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    for override in parsed:
        part = config.hydra.overrides.hydra if override.is_hydra_override() else config.hydra.overrides.task
        part.append(override.input_line)
    _name_overrides(config)


def with_overrides(config: DictConfig, overrides: Sequence[str], changed: Sequence[str]) -> DictConfig:
    """Returns a copy of a composed config as if it had been composed of other overrides.

    `overrides` are all of them, and `changed` those of plain keys that the config has not been composed of.
    """
    config = copy.deepcopy(config)
    parser = OverridesParser.create()
    ConfigLoaderImpl._apply_overrides_to_config(parser.parse_overrides(list(changed)), config)
    parsed = parser.parse_overrides(list(overrides))
    config.hydra.overrides.task = [item.input_line for item in parsed if not item.is_hydra_override()]
    _name_overrides(config)
    return config


def _name_overrides(config: DictConfig) -> None:
    settings = config.hydra.job.config.override_dirname
    task = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    config.hydra.job.override_dirname = get_overrides_dirname(
        overrides=task, kv_sep=settings.kv_sep, item_sep=settings.item_sep, exclude_keys=settings.exclude_keys
    )


def _set_up_log(hydra: Hydra, config: DictConfig, mode: RunMode) -> None:
    """Sets up Hydra's own log, which prints how the config came about with `hydra.verbose=true`."""
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    if logging.getLogger(hydra_module.__name__).isEnabledFor(logging.DEBUG):
        hydra_module.log = logging.getLogger(hydra_module.__name__)
        hydra._print_debug_info(CONFIG_NAME, [*config.hydra.overrides.hydra, *config.hydra.overrides.task], mode)


def run_composed(hydra: Hydra, config: DictConfig, task_function: TaskFunction) -> JobReturn:
    """Runs a task with a composed config in the folder that it names; what the task raised is in the result."""
    if config.hydra.mode is None:
        add_overrides(config, [f"hydra.mode={RunMode.RUN.name}"])
    _set_up_log(hydra, config, RunMode.RUN)
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=CONFIG_NAME)
    result = run_job(
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
        task_function=task_function,
        config=config,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        configure_logging=True,
    )
    callbacks.on_run_end(config=config, config_name=CONFIG_NAME, job_return=result)
    return result


def failure(result: JobReturn) -> Exception | None:
    """Returns what a task raised; `JobReturn.return_value` would print the overrides before it raises that."""
    return result._return_value if result.status is JobStatus.FAILED else None


def sweep_composed(hydra: Hydra, config: DictConfig, task_function: TaskFunction) -> Any:
    """Runs a sweep with its composed config, in which no swept key is set."""
    _set_up_log(hydra, config, RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    callbacks.on_multirun_start(config=config, config_name=CONFIG_NAME)
    sweeper = Plugins.instance().instantiate_sweeper(
        config=config,
        hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
        task_function=task_function,
    )
    arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(arguments, list)
    result = sweeper.sweep(arguments=arguments)
    callbacks.on_multirun_end(config=config, config_name=CONFIG_NAME)
    return result


def show(hydra: Hydra, args: argparse.Namespace, overrides: Sequence[str], composed: DictConfig | None = None) -> None:
    """Prints what `--hydra-help`, `--cfg`, `--shell-completion` or `--info` asks for.

    `composed` is the config of these overrides, which Hydra would compose anew for each thing that it prints.
    """
    if composed is not None:
        hydra.compose_config = lambda **_: copy.deepcopy(composed)  # type: ignore[method-assign]
    args = argparse.Namespace(**{**vars(args), "overrides": [*overrides]})
    if args.hydra_help:
        hydra.hydra_help(config_name=CONFIG_NAME, args_parser=get_args_parser(), args=args)
    elif args.cfg:
        hydra.show_cfg(
            config_name=CONFIG_NAME,
            overrides=args.overrides,
            cfg_type=args.cfg,
            package=args.package,
            resolve=args.resolve,
        )
    elif args.shell_completion:
        hydra.shell_completion(config_name=CONFIG_NAME, overrides=args.overrides)
    else:
        hydra.show_info(args.info, config_name=CONFIG_NAME, overrides=args.overrides)
