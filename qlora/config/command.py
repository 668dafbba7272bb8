"""The config of a whole command, a sweep included: composed, checked, and printed by `--cfg job`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qlora.config.combinations import Combinations
from qlora.config.compose import compose_dict
from qlora.config.conversion import to_config, without_hydra
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import refuse_unreadable
from qlora.config.schema import Config
from qlora.config.secret_values import refuse_resolved_secrets, refuse_secrets
from qlora.config.suggestions import unknown_key
from qlora.config.sweep_values import (
    expand_sweep,
    refuse_intervals,
    refuse_single_job,
    refuse_sweeps,
    sweep_params,
    unconditional_sweep,
)
from qlora.errors import ConfigError

GRID_SWEEPER = "hydra_plugins.qlora_sweep.GridSweeper"
"""The class that walks through the combinations of a grid."""


def check_overrides(
    overrides: Sequence[str], config_dir: Path | str | None = None, *, multirun: bool = False
) -> DictConfig:
    """Raises `ConfigError` if a value in these overrides would be refused; starts nothing.

    Returns the config of the first job, without the `hydra` node.
    """
    return without_hydra(check_command(overrides, config_dir, multirun=multirun))


@dataclass(frozen=True)
class Command:
    """The config of a command, or of the first job of its sweep, in both forms."""

    node: DictConfig
    """What Hydra composed, with its `hydra` node."""
    config: Config
    """The same as dataclasses, checked."""


def check_command(
    overrides: Sequence[str],
    config_dir: Path | str | None = None,
    *,
    multirun: bool = False,
    leave_grid: bool = False,
    printed: bool = False,
) -> DictConfig:
    """Does what `check_overrides` does, and returns the config with its `hydra` node; the options are those of
    `compose_command`."""
    return compose_command(overrides, config_dir, multirun=multirun, leave_grid=leave_grid, printed=printed).node


def compose_command(
    overrides: Sequence[str],
    config_dir: Path | str | None = None,
    *,
    multirun: bool = False,
    leave_grid: bool = False,
    printed: bool = False,
) -> Command:
    """Composes a command once and checks it; raises `ConfigError` for a value that would be refused.

    The values of a sweep come from the command line and from `hydra.sweeper.params` of a `sweep=` file. Each is checked
    once, beside the first value of every other key. A search checks the values that it tries under a condition itself;
    with `leave_grid`, the sweeper of a grid checks all of its own. `printed`: the resolved config is to be printed.
    """
    refuse_unreadable(overrides)
    refuse_secrets(text.partition("=")[::2] for text in overrides)
    overrides = keep_spelling(overrides)
    first = next(expand_sweep(overrides))
    composed = compose_dict(first, config_dir)
    refuse_resolved_secrets(composed, printed=printed)
    if OmegaConf.is_missing(composed.task, "name"):
        raise ConfigError("task.name is not set; choose an option for its group, e.g. task=train")
    described = composed.task.name.describes_sweep  # for wandb, which runs the jobs
    if not multirun and not described and composed.hydra.mode is not RunMode.MULTIRUN:
        refuse_sweeps(overrides)
        return Command(composed, to_config(composed))
    is_grid = str(composed.hydra.sweeper._target_) == GRID_SWEEPER
    if is_grid and not described:
        refuse_single_job(overrides, composed)
    if is_grid and not described:
        refuse_intervals([*overrides, *sweep_params(composed, overrides)])
    if (swept := unconditional_sweep(composed, overrides)) != list(overrides):
        overrides = swept
        composed = compose_dict(next(expand_sweep(overrides)), config_dir)
    config = to_config(composed)
    if not (is_grid and leave_grid and not described):
        Combinations(overrides, config_dir, first=composed).check()
    return Command(composed, config)


def show_config(composed: DictConfig, package: str | None, *, resolve: bool) -> str:
    """Returns what `--cfg job` prints; Hydra's own way to it would compose everything a second time."""
    part = composed if package in (None, "_global_") else OmegaConf.select(composed, str(package))
    if part is None:
        raise unknown_key(str(package))
    if not OmegaConf.is_config(part):
        return f"{part}\n"
    head = f"# @package {package}\n" if part is not composed else ""
    return head + OmegaConf.to_yaml(part, resolve=resolve)
