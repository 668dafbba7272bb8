"""What Hydra finds as its plugins: the launchers of a process per job, and the sweeper that searches by Optuna.

Hydra takes plugins from the package `hydra_plugins` only and imports them at every start, so the work is elsewhere. It
does so without `sys.modules`, so that dataclasses here cannot have annotations as text (`from __future__`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from qlora.sweep.engine_config import RaySettings, SearchSettings, SlurmSettings


@dataclass
class ProcessesConf:
    """One process a job; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.qlora_sweep.ProcessesLauncher"
    n_jobs: int | None = None
    """Jobs that run at a time; unset: one for each `gpus_per_job` GPUs, or one where there is no GPU."""
    gpus_per_job: int = 1
    """GPUs that a job sees; the others are hidden from it."""


@dataclass
class GridConf:
    """All combinations of the values of several keys; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.qlora_sweep.GridSweeper"
    max_batch_size: int | None = None
    """Jobs that launchers other than `processes` get at a time; unset: all."""
    params: dict[str, str] | None = None
    """What to combine: a key and its values, as the command line writes them; it comes before them."""


# In place of Hydra's own, which composes all combinations before the first job and again for each.
ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridConf, provider="qlora")
ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="qlora")
ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmSettings, provider="qlora")
ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RaySettings, provider="qlora")
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=SearchSettings, provider="qlora")


class OwnLauncher(Launcher):
    """Runs each job in a process of its own, so that none can take the others with it."""

    def __init__(self, **settings: Any) -> None:
        """Takes what the launcher's settings declare; `build_engine` reads them from the config, with their types."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what Hydra composes jobs with; the task function runs in the jobs' own processes."""
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs that are not finished yet and returns what each of them gave."""
        from qlora.sweep.engines import build_engine
        from qlora.sweep.launcher import launch

        return launch(
            self.config,
            self.hydra_context.config_loader,
            [list(overrides) for overrides in job_overrides],
            build=partial(build_engine, self.config.hydra.launcher),
        )


class ProcessesLauncher(OwnLauncher):
    """Runs jobs on this machine."""


class SlurmLauncher(OwnLauncher):
    """Runs jobs on a SLURM cluster."""


class RayLauncher(OwnLauncher):
    """Runs jobs on a Ray cluster."""


class OwnSweeper(Sweeper):
    """What the sweepers below have in common."""

    def __init__(self, **settings: Any) -> None:
        """Takes what the config declares; `sweep` reads it from there, with its types."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what Hydra composes jobs with, and builds the launcher that runs them."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def launching(self, room: int | None = None) -> dict[str, Any]:
        """Returns the launcher's function, and what builds the engine of a launcher of ours; None: it is another's.

        `room` is how many jobs may wait and run at a time on a cluster.
        """
        from qlora.sweep.engines import build_engine

        assert self.config is not None
        is_ours = isinstance(self.launcher, OwnLauncher)
        build = partial(build_engine, self.config.hydra.launcher, room=room) if is_ours else None
        return {"launch": self.launcher.launch, "build": build}


class GridSweeper(OwnSweeper):
    """Walks through all combinations of the values of several keys."""

    def sweep(self, arguments: list[str]) -> None:
        """Runs the jobs that are not finished yet."""
        from qlora.sweep.grid import run_grid

        assert self.config is not None
        run_grid(self.config, arguments, **self.launching())


class OptunaSweeper(OwnSweeper):
    """Searches by Optuna for the best values of several keys."""

    def sweep(self, arguments: list[str]) -> None:
        """Runs the trials that the study lacks."""
        from qlora.errors import ResourceError

        try:
            from qlora.sweep.search import search
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            raise ResourceError(
                "hydra/sweeper=optuna needs Optuna, which is not installed: pip install 'qlora[optuna]'"
            ) from error
        assert self.config is not None
        assert self.hydra_context is not None
        launching = self.launching(room=self.config.hydra.sweeper.batch_size)
        search(self.config, self.hydra_context.config_loader, arguments, **launching)
