"""Functions of the user's own, named as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from qlora.errors import ConfigError, did_you_mean


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Returns the function that `path` names; raises `ConfigError`, which names `key`, where there is none."""
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{key}={path}: there is no module {error.name}; it must be installed or lie on PYTHONPATH"
            ) from None
        raise
    function = getattr(module, name, None)
    if not callable(function):
        functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ConfigError(f"{key}={path}: module {module_name} has no function {name}{did_you_mean(name, functions)}")
    return function
