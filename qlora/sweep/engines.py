"""Engines of other projects that run the jobs of a sweep."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from qlora.errors import ConfigError

ENGINES = {
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "hydra-ray-launcher"),
}
"""By `hydra/launcher=`: the module and the package that bring the engine."""


def check_engine(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` if the engine that a command asks for is not installed."""
    for text in overrides:
        key, _, name = text.partition("=")
        if key != "hydra/launcher" or name not in ENGINES:
            continue
        module, package = ENGINES[name]
        if not _is_there(module):
            raise ConfigError(f"{text} needs the package {package}; install it with pip install 'qlora[{name}]'")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # without any plugin there is no hydra_plugins
        return False
