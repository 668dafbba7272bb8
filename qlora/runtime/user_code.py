"""Code of the user's own, named as `module:function` or as `module.Class`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from qlora.errors import ConfigError, did_you_mean


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Returns the function that `path` names; raises `ConfigError`, which names `key`, where there is none."""
    module_name, name = path.split(":")
    return _import(module_name, name, f"{key}={path}", "function")


def import_class(path: str, key: str, kind: type) -> type:
    """Returns the class below `kind` that `path` names; raises `ConfigError`, which names `key`, for anything else."""
    module_name, _, name = path.rpartition(".")
    shown = f"{key}={path}"
    if not module_name:
        raise ConfigError(f"{shown} must be module.Class, the full name of a class")
    result = _import(module_name, name, shown, "class")
    if not isinstance(result, type) or not issubclass(result, kind):
        raise ConfigError(f"{shown} is no {kind.__name__}")
    return result


def _import(module_name: str, name: str, shown: str, what: str) -> Any:
    """Returns what a module itself defines: not a module that it imports, and nothing of another package's."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{shown}: there is no module {error.name}; it must be installed or lie on PYTHONPATH"
            ) from None
        raise ConfigError(f"{shown}: {module_name} needs the module {error.name}, which is not installed") from error
    result = getattr(module, name, None)
    if not callable(result):
        functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ConfigError(f"{shown}: module {module_name} has no {what} {name}{did_you_mean(name, functions)}")
    home = str(getattr(result, "__module__", None))
    if home.partition(".")[0] != module_name.partition(".")[0]:
        raise ConfigError(
            f"{shown}: this {what} is no code of {module_name}, which imports it from {home}; name it where it is "
            "written, and trust that package"
        )
    return result
