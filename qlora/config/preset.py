"""What a run's config changes of its preset: of the options that its overrides choose, without its other overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from qlora.config.compose import compose_dict
from qlora.config.conversion import to_config, without_hydra
from qlora.config.options import group_names
from qlora.config.saved_config import config_to_dict, flatten
from qlora.config.schema import Config
from qlora.errors import ConfigError

SEARCH_PATH = "hydra.searchpath"
OF_ONE_RUN = ("name", "resume", "sweep.name")
"""Keys that say nothing of what is trained."""


def differences_to_preset(config: Config, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Returns the values of the preset by the full keys that the run sets otherwise.

    A key that the preset lacks has the value None. None: the preset cannot be composed by itself.
    """
    groups = _groups()
    choices = tuple(word for word in overrides if _is_choice(word, groups))
    if {_key(word) for word in overrides if word not in choices} <= {*OF_ONE_RUN}:
        return {}  # nothing else is set, so that nothing need be composed
    try:
        composed = compose_dict(choices, is_read=True, in_command=GlobalHydra.instance().is_initialized())
    except ConfigError:
        return None
    values = dict(flatten(config_to_dict(config)))
    try:
        preset = dict(flatten(config_to_dict(to_config(composed))))
    except ConfigError:  # an option leaves a key to the user
        keys = [_key(word) for word in overrides]
        preset = _as_composed(composed, keys)
        values = {key: value for key, value in values.items() if _is_below(key, keys)}
    compared = [key for key in dict.fromkeys([*values, *preset]) if key not in OF_ONE_RUN]
    return {key: preset.get(key) for key in compared if preset.get(key) != values.get(key)}


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _groups() -> set[str]:
    """Returns the groups of the project and, in a command, those of the user."""
    instance = GlobalHydra.instance()
    return {*group_names(), *(instance.config_loader().list_groups("") if instance.is_initialized() else [])}


def _is_choice(override: str, groups: set[str]) -> bool:
    key = _key(override)
    return key == SEARCH_PATH or key in groups or "/" in key


def _as_composed(preset: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a preset at or below `keys`, as its files write them; None where they are left open."""
    plain: Any = OmegaConf.to_container(without_hydra(preset), resolve=False, throw_on_missing=False, enum_to_str=True)
    return {key: None if value == "???" else value for key, value in flatten(plain) if _is_below(key, keys)}


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)
