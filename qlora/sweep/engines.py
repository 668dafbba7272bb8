"""The engines that run the jobs of a sweep, by `hydra/launcher=`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora.config.schema import Config, Device
from qlora.errors import ConfigError, ResourceError
from qlora.sweep.engine_config import RaySettings, SlurmSettings
from qlora.sweep.job_processes import RunTasks, Task, build_slots, run_tasks

PACKAGES = {"ray": "ray"}
"""The package that an engine needs, by `hydra/launcher=`; the extra has the same name."""


def check_engine(overrides: Sequence[str]) -> None:
    """Raises `ResourceError` if the requested engine is not installed."""
    for text in overrides:
        key, _, name = text.partition("=")
        if key != "hydra/launcher" or name not in PACKAGES:
            continue
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ResourceError(
                f"{text} needs the package {PACKAGES[name]}; install it with pip install 'qlora[{name}]'"
            )


def build_engine(launcher: DictConfig, config: Config, room: int | None = None) -> RunTasks:
    """Returns the engine of a sweep with jobs like `config`; at most `room` jobs wait and run at a time.

    Raises a `UserError` for impossible settings.
    """
    settings: Any = OmegaConf.to_object(launcher)
    if isinstance(settings, SlurmSettings):
        settings.check()
        return partial(_run_on_slurm, settings, config.sweep.detach, room)
    check_not_detached(config)
    if isinstance(settings, RaySettings):
        settings.check()
        from qlora.sweep.ray_jobs import run_on_ray

        return partial(run_on_ray, settings, room)
    slots = build_slots(settings.n_jobs, settings.gpus_per_job, on_cpu=config.device is Device.cpu)
    return partial(run_tasks, slots=slots)


def check_not_detached(config: Config) -> None:
    """Raises `ConfigError` where jobs end with the command that is to return at once."""
    if config.sweep.detach:
        raise ConfigError(
            "sweep.detach=true needs an engine that keeps the jobs when the command has ended: add "
            "hydra/launcher=slurm, or leave it out"
        )


def _run_on_slurm(
    settings: SlurmSettings,
    detach: bool,
    room: int | None,
    next_task: Callable[[], Task | None],
    **tell: Callable[..., Any],
) -> None:
    from qlora.sweep.slurm import SlurmJobs

    SlurmJobs(settings, detach=detach, **tell).run(next_task, room)
