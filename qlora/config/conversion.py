"""A composed `DictConfig` becomes the dataclasses of `schema`; unknown keys and impossible values are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config import trust
from qlora.config.fields import KeyPath, dotted, type_at
from qlora.config.messages import explain
from qlora.config.paths import check_paths
from qlora.config.schema import Config
from qlora.config.secret_values import leaves, refuse_secrets
from qlora.config.suggestions import unknown_key
from qlora.errors import ConfigError
from qlora.upstream.omegaconf import is_filled, raw_node

LARGEST_NUMBER = 2**63 - 1
"""What torch and Arrow count to."""


def to_config(composed: DictConfig) -> Config:
    """Turns a composed config into dataclasses; raises `ConfigError` for unknown keys and impossible values."""
    with trust.fixed_resolvers():
        return _to_config(without_hydra(composed))


def _to_config(composed: DictConfig) -> Config:
    try:
        refuse_secrets(leaves(OmegaConf.to_container(composed, resolve=True), ""))
        for key in unknown_keys(composed):
            raise unknown_key(key)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{missing[0]} is not set; choose an option for its group or give {missing[0]}=VALUE")
        check_values(OmegaConf.to_container(composed, resolve=True))
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(config, Config)
    check_paths(config)
    return config


def check_values(value: Any, path: KeyPath = ()) -> None:
    """Raises `ConfigError` for what OmegaConf lets through: a list or a mapping as a text, a number of over 63 bits."""
    kind = type_at(path)
    if kind is str and isinstance(value, dict | list):
        raise ConfigError(f"{dotted(path)} must be a text, got {value!r}")
    if kind is int and isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise ConfigError(f"{dotted(path)} must lie between -2^63 and 2^63, got {value}; write a smaller number")
    for name, item in value.items() if isinstance(value, dict) else ():
        check_values(item, (*path, str(name)))
    for index, item in enumerate(value) if isinstance(value, list) else ():
        check_values(item, (*path, f"[{index}]"))


def without_hydra(composed: DictConfig) -> DictConfig:
    """Returns a config without the `hydra` node."""
    if "hydra" not in composed:
        return composed
    composed = composed.copy()
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed


def unknown_keys(composed: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the full names of keys that no dataclass field declares, such as `+` on the command line adds."""
    declared = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(declared):
        return
    names = {item.name for item in dataclasses.fields(declared)}
    for key in composed:
        full = f"{prefix}{key!s}"
        if key not in names:
            yield full
        elif isinstance(child := raw_node(composed, key), DictConfig) and is_filled(child):
            yield from unknown_keys(child, f"{full}.")
