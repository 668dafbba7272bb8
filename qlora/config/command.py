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
from qlora.config.schema.values import written
from qlora.config.secret_values import refuse_resolved_secrets, refuse_secrets
from qlora.config.suggestions import unknown_key
from qlora.config.sweep_values import (
    refuse_intervals,
    refuse_single_job,
    refuse_sweeps,
    sweep_params,
    unconditional_sweep,
)
from qlora.errors import ConfigError

OWN_SWEEPERS = "hydra_plugins.qlora_sweep."
GRID_SWEEPER = f"{OWN_SWEEPERS}GridSweeper"
"""The class that walks through the combinations of a grid."""


def check_overrides(
    overrides: Sequence[str], config_dir: Path | str | None = None, *, multirun: bool = False
) -> DictConfig:
    """Raises `ConfigError` if a value in these overrides would be refused; starts nothing.

    Returns the config of the first job, without the `hydra` node.
    """
    return without_hydra(compose_command(overrides, config_dir, multirun=multirun).node)


@dataclass(frozen=True)
class ComposedCommand:
    """The composed config of a command."""

    base: DictConfig
    """What Hydra composed, with its `hydra` node; no key of a sweep is set."""
    node: DictConfig
    """The same for the first job of a sweep; otherwise the base."""
    config: Config
    """The node as dataclasses, checked."""


def compose_command(
    overrides: Sequence[str],
    config_dir: Path | str | None = None,
    *,
    multirun: bool = False,
    leave_grid: bool = False,
    printed: bool = False,
    is_read: bool = False,
) -> ComposedCommand:
    """Composes a command and checks it; raises `ConfigError` for a value that would be refused.

    The values of a sweep come from the command line and from `hydra.sweeper.params` of a `sweep=` file. Each is checked
    once, beside the first value of every other key. A search checks the values that it tries under a condition itself;
    with `leave_grid`, the sweeper of a grid checks all of its own. `printed`: the resolved config is to be printed.
    `is_read`: the overrides are those that `read_typed` has returned.
    """
    refuse_unreadable(overrides)
    refuse_secrets(text.partition("=")[::2] for text in overrides)
    overrides = keep_spelling(overrides)
    base = compose_dict(overrides, config_dir, leave_swept=True, is_read=is_read)
    refuse_resolved_secrets(base, printed=printed)
    if OmegaConf.is_missing(base.task, "name"):
        raise ConfigError("task.name is not set; choose an option for its group, e.g. task=train")
    described = base.task.name.describes_sweep  # for wandb, which runs the jobs
    sweeps = multirun or described or base.hydra.mode is RunMode.MULTIRUN
    grid = Combinations(unconditional_sweep(base, overrides) if sweeps else overrides, config_dir, base=base)
    is_grid = sweeps and not described and str(base.hydra.sweeper._target_) == GRID_SWEEPER
    if is_grid:
        refuse_single_job(overrides, base)
        refuse_intervals([*overrides, *sweep_params(base, overrides)])
    node = grid.first_node
    refuse_resolved_secrets(node, printed=printed)
    if not sweeps:
        refuse_sweeps(overrides)
    config = to_config(node)
    _refuse_comparison(config, base, sweeps=sweeps)
    if sweeps and not (is_grid and leave_grid):
        grid.check()
    return ComposedCommand(base, node, config)


def _refuse_comparison(config: Config, base: DictConfig, *, sweeps: bool) -> None:
    """Refuses a question where no sweep of ours can answer it; a job of one is started with `hydra.mode=RUN`."""
    by, sweeper = config.sweep.compare.by, str(base.hydra.sweeper._target_)
    if by is None or base.hydra.mode is RunMode.RUN:
        return
    if not sweeps:
        raise ConfigError(f"sweep.compare.by={by} compares runs of a sweep, and this is a run; add -m {by}=A,B")
    described, name = config.task.name.describes_sweep, written(config.task.name).replace("_", "-")
    if described or not sweeper.startswith(OWN_SWEEPERS):
        chooser = f"task={name}" if described else sweeper
        raise ConfigError(
            f"sweep.compare.by={by}: {chooser} leaves the choice of runs to another program, which adds no seeds; "
            "leave it out"
        )


def show_config(composed: DictConfig, package: str | None, *, resolve: bool) -> str:
    """Returns what `--cfg job` prints; Hydra's own way to it would compose everything a second time."""
    part = composed if package in (None, "_global_") else OmegaConf.select(composed, str(package))
    if part is None:
        raise unknown_key(str(package))
    if not OmegaConf.is_config(part):
        return f"{part}\n"
    head = f"# @package {package}\n" if part is not composed else ""
    return head + OmegaConf.to_yaml(part, resolve=resolve)
