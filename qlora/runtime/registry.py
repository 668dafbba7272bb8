"""Loads the classes that a config names: shipped ones, those of installed packages, and `module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.config.registries.installed import check_name, installed_names
from qlora.config.user_code import import_function
from qlora.errors import ConfigError


def load_named(name: str, shipped: Mapping[str, str], *, group: str, key: str, methods: Sequence[str]) -> Any:
    """Returns the class that `name` means, which must have `methods`.

    `shipped` maps names to `module:Class`; `group` is the entry point group of other packages. `module:Class` itself
    is imported too: the config checks beforehand that its package is trusted. Raises `ConfigError`, which names `key`.
    """
    check_name(key, name, shipped, group)
    if name in shipped:
        module, _, kind = shipped[name].partition(":")
        return getattr(importlib.import_module(module), kind)
    result: Any = import_function(installed_names(group).get(name, name), key)
    check_methods(result, methods, f"{key}={name}")
    return result


def check_methods(kind: Any, methods: Sequence[str], label: str) -> None:
    """Raises `ConfigError` for a class, which `label` names, without one of `methods`."""
    if missing := [method for method in methods if not hasattr(kind, method)]:
        raise ConfigError(f"{label} has no {' and no '.join(missing)}; docs/extending.md shows what it needs")
