"""Private names of OmegaConf 2.3, and why each is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader
from omegaconf.basecontainer import BaseContainer

__all__ = ["get_omega_conf_dumper", "get_yaml_loader"]
"""The classes by which OmegaConf reads and writes YAML: plain PyYAML reads `2e-4` as a text, and writes it unquoted."""


def raw_node(config: DictConfig, key: Any) -> Any:
    """Returns the node below `key`; public access would resolve an interpolation in it, and fail on a missing value."""
    return config._get_node(key)


def raw_value(node: Any) -> Any:
    """Returns what a node holds, an interpolation as its text; containers are returned as they are."""
    return node._value() if isinstance(node, Node) and not OmegaConf.is_config(node) else node


def set_value(config: DictConfig, key: str, value: Any) -> None:
    """Sets a field, also of a config that is read-only, as Hydra's composed ones are in part."""
    node = config._get_node(key)
    assert isinstance(node, Node)
    node._set_value(value)


def is_filled(node: DictConfig) -> bool:
    """Returns whether a node holds keys: it is not null, missing or an interpolation."""
    return not (node._is_none() or node._is_missing() or node._is_interpolation())


@contextmanager
def only_resolvers(is_kept: Callable[[str], bool]) -> Iterator[None]:
    """Hides the functions for `${NAME:...}` that are not kept inside the block; those registered in it stay.

    OmegaConf can remove all of them or one, and cannot list them.
    """
    previous = BaseContainer._resolvers
    kept = {name: resolver for name, resolver in previous.items() if is_kept(name)}
    BaseContainer._resolvers = kept
    try:
        yield
    finally:
        BaseContainer._resolvers = {**previous, **kept}
