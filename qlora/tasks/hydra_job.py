"""One job as Hydra runs it: alone, or one of a sweep whose engine runs jobs by a function."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qlora.config.compose import register, to_config
from qlora.config.paths import anchor_paths, give_home, short_path
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config
from qlora.errors import Pruned
from qlora.runtime import distributed
from qlora.runtime.console import close_bars, quiet_libraries
from qlora.runtime.environment import prepare_environment
from qlora.runtime.run_folder import RunFolder
from qlora.sweep import names
from qlora.sweep.jobs import recorded
from qlora.tasks import build_job, run_job
from qlora.text import quoted

# Engines that send `job` to other machines import this module there.
register()
names.register()


def job(composed: DictConfig, typed: Sequence[str] = ()) -> float | None:
    """Runs one composed job in Hydra's output folder and returns its objective.

    `typed` are the words of the command line that started it alone.
    """
    config = to_config(composed)
    hydra = HydraConfig.get()
    output_dir, typed_in, sweep_dir = Path(hydra.runtime.output_dir), Path(hydra.runtime.cwd), Path(hydra.sweep.dir)
    in_sweep, verbose = hydra.mode is RunMode.MULTIRUN, bool(hydra.verbose)
    if hydra.job.chdir:
        sweep_dir = typed_in / sweep_dir
        anchor_paths(config, typed_in)
    task = build_job(config, output_dir, list(hydra.overrides.task), names.membership(hydra))
    task.options, task.typed = own_options(hydra), list(typed)
    if task.needs.caches:  # an engine may have sent the job to another machine
        give_home(config.data.cache_dir)
    prepare_environment(verbose=verbose)
    quiet_libraries(verbose=verbose)
    try:
        with _recorded(output_dir, hydra, config):
            return run_job(task, verbose=verbose).objective
    except Pruned:
        close_bars()
        return None
    except Exception as error:
        if in_sweep:  # which keeps the exception until its end, and its traceback holds the model
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        del task
        if in_sweep:  # of an engine that runs jobs by this function; ours keeps the files of a sweep itself
            free_memory()  # for the next job of this process
            from qlora.sweep.sweep_page import write_overview

            write_overview(sweep_dir, config.objective)


def own_options(hydra: Any) -> list[str]:
    """Returns the flag, and the override for further ones, that name the folders with the user's own options."""
    sources = [str(source.path).removeprefix("file://") for source in hydra.runtime.config_sources
               if source.provider == "command-line"]  # fmt: skip
    if not sources:
        return []
    searched = [f"hydra.searchpath=[{','.join(map(quoted, sources[1:]))}]"] if len(sources) > 1 else []
    return [*searched, "--config-dir", short_path(sources[0])]


def _recorded(folder: Path, hydra: Any, config: Config) -> AbstractContextManager[None]:
    """Locks the run's folder and records what becomes of the run; of several processes, the main one does."""
    if not distributed.is_main_process():
        return nullcontext()
    result = RunFolder(folder).result(config.task.name.value).name
    return recorded(folder, names.own_overrides(hydra), result, config_to_dict(config))


def free_memory() -> None:
    """Gives a finished job's memory back, on the host and on the GPU."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
