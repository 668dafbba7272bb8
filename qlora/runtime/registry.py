"""Classes by name: shipped ones, those that installed packages register as entry points, and `module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from qlora.errors import ConfigError, did_you_mean
from qlora.runtime.user_code import import_function


def load_named(name: str, shipped: Mapping[str, str], *, group: str, key: str, methods: Sequence[str]) -> Any:
    """Returns the class that `name` means, which must have `methods`.

    `shipped` maps names to `module:Class`; `group` is the entry point group of other packages. `module:Class` itself
    is imported too: the config checks beforehand that its package is trusted. Raises `ConfigError`, which names `key`.
    """
    if name in shipped:
        module, _, kind = shipped[name].partition(":")
        return getattr(importlib.import_module(module), kind)
    if ":" in name:
        result: Any = import_function(name, key)
    else:
        registered = {point.name: point for point in entry_points(group=group)}
        if name not in registered:
            known = [*shipped, *registered]
            raise ConfigError(
                f"{key}={name} is unknown{did_you_mean(name, known)}; choose one of {', '.join(known)}, or "
                f"module:Class of a package that registers none under {group}"
            )
        result = registered[name].load()
    if missing := [method for method in methods if not hasattr(result, method)]:
        raise ConfigError(f"{key}={name} has no {' and no '.join(missing)}; docs/extending.md shows what it needs")
    return result
