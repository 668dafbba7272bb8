"""The folders of sweeps and jobs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qlora.config.conversion import to_config
from qlora.config.saved_config import config_to_dict
from qlora.runtime.sweep_job import SweepJob
from qlora.sweep.jobs import job_folder
from qlora.text import quoted

FOLDER = Path("outputs/sweeps")


def register() -> None:
    """Registers the resolver `qlora.job_name` of `conf/config.yaml` with OmegaConf; may be called many times."""
    OmegaConf.register_new_resolver("qlora.job_name", job_name, replace=True)


def folder_words(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that name a sweep's folder and its jobs, so that the same command resumes in them.

    Unless the command names a folder, the sweep is named after `experiment=` and `sweep=`, else after the varied keys.
    A job is named after the keys that vary.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = {override.key_or_group: override for override in parsed if not override.is_sweep_override()}
    chosen = [str(plain[key].value()) for key in ("experiment", "sweep") if key in plain]
    varied = [override.key_or_group for override in parsed if override.is_sweep_override()]
    folder = f"hydra.sweep.dir={FOLDER / ('_'.join(chosen or varied) or 'sweep')}"
    fixed = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(plain)}]"
    return [fixed] if plain.keys() & {"name", "hydra.sweep.dir"} else [fixed, folder]


def new_folder_word(folder: Path, sweeps: bool) -> str:
    """Returns the override that names a folder where there is none yet: FOLDER, else FOLDER-2, FOLDER-3 ..."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    chosen = next(path for path in itertools.chain([folder], numbered) if not path.exists())
    return f"hydra.{'sweep' if sweeps else 'run'}.dir={quoted(str(chosen))}"


def own_overrides(hydra: Any) -> list[str]:
    """Returns the overrides that distinguish a job: those whose keys `folder_words` did not exclude."""
    fixed = set(hydra.job.config.override_dirname.exclude_keys)
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    return [override.input_line or "" for override in parsed if override.key_or_group not in fixed]


def membership(hydra: Any) -> SweepJob | None:
    """Returns the sweep of a job, as Hydra or the process that started it says; None: it belongs to none."""
    if hydra.mode is RunMode.MULTIRUN:
        return SweepJob(Path(hydra.sweep.dir).name, own_overrides(hydra))
    return SweepJob.from_environment(list(hydra.overrides.task))


def job_name(*, _root_: DictConfig) -> str:
    """Returns the name of a job's folder, its overrides and its identity, for engines that see one job at a time."""
    config = config_to_dict(to_config(_root_))
    return job_folder(Path(_root_.hydra.sweep.dir), own_overrides(_root_.hydra), config).name
